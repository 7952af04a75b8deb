"""One split of a dataset: its images decoded, resized, and cached if they are few."""

import functools
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from tf_repvgg.data.preprocessing import Preprocessing

PARALLEL_CALLS = os.cpu_count() or 1
_CACHE_BYTES = 2 * 1024**3
_SHUFFLE_IMAGES = 50_000


class ImageSource(Protocol):
    """Encoded images and labels of a dataset; implemented by `TfdsSource` and `ImageFolder`."""

    @property
    def name(self) -> str:
        """Name of the dataset, without a path."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers."""

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        """Height, width and channels; None for a height and width that differ between images."""

    @property
    def flips(self) -> bool:
        """Whether a mirrored image belongs to the same class."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits that have labels."""

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits as TFDS writes them: "train[:90%]"."""

    def list_examples(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """References to images, for `read`, and int64 labels, in a fixed order or shuffled."""

    def read(self, reference: tf.Tensor) -> tf.Tensor:
        """Reads an image file (bytes)."""

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes an image file to uint8 [height, width, channels]."""


class ImageSplit:
    """Images uint8 [*size, channels] and int64 labels of one split of a dataset.

    Args:
      source: Dataset.
      split: Name of a split of the dataset, or a part or sum of splits as TFDS writes them: "train[:90%]".
      preprocessing: Preprocessing with a size.
    """

    def __init__(self, source: ImageSource, split: str, preprocessing: Preprocessing) -> None:
        self._source = source
        self._split = split
        self._preprocessing = preprocessing
        *stored_size, channels = source.image_shape
        assert preprocessing.size is not None
        self.image_shape = (*preprocessing.size, channels)
        self._is_resized = preprocessing.resize_shorter_side is not None or preprocessing.size != tuple(stored_size)

    def __len__(self) -> int:
        return self._source.num_examples(self._split)

    def list_examples(self, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """References to images, for `read`, and labels, in their stored order or shuffled as well as memory allows."""
        return self._source.list_examples(self._split, shuffle_seed)

    def read(self, reference: tf.Tensor) -> tf.Tensor:
        """Reads an image file (bytes)."""
        return self._source.read(reference)

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes an image file to uint8 [height, width, channels], not resized."""
        return self._source.decode(encoded)

    def images(self, is_wanted: np.ndarray | None = None) -> tf.data.Dataset:
        """Images and labels in their stored order, cached if they are few.

        Args:
          is_wanted: Whether to read each image, bool [images]; None for all.
        """
        examples = self.list_examples().with_options(without_autotuning())
        if is_wanted is not None:
            selection = tf.constant(is_wanted)
            examples = examples.enumerate().filter(lambda index, _: selection[index]).map(lambda _, example: example)
        dataset = self._decode_and_resize(examples)
        return dataset.cache() if self._fits_cache else dataset

    def shuffle_images(self, seed: int) -> tf.data.Dataset:
        """Images and labels shuffled, from a cache that all calls share, if the images are few."""
        if not self._fits_cache:
            return self._decode_and_resize(self.list_examples(shuffle_seed=seed))
        # Iterating again gives the same order: Keras may start an iterator, drop it, and start another.
        count = min(len(self), _SHUFFLE_IMAGES)
        return self._cached_images.shuffle(count, seed=seed, reshuffle_each_iteration=False)

    @functools.cached_property
    def _cached_images(self):
        return self.images()

    @property
    def _fits_cache(self):
        height, width, channels = self.image_shape
        return len(self) * height * width * channels <= _CACHE_BYTES

    def _decode_and_resize(self, examples):
        def decode_and_resize(reference, label):
            image = self._source.decode(self.read(reference))
            if self._is_resized:
                image = tf.ensure_shape(self._preprocessing.resize(image), self.image_shape)
            return image, label

        return examples.map(decode_and_resize, num_parallel_calls=PARALLEL_CALLS)


def without_autotuning() -> tf.data.Options:
    """Options that switch tf.data's autotuning off.

    Its thread sleeps up to a minute at a time, and whoever drops an iterator waits for it to wake up: in TensorFlow
    2.21 the end of an epoch, or a short evaluation, took 10 s.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
