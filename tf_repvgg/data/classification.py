"""From a dataset's name to batches: decode, resize, cache, shuffle, batch, augment, normalise, prefetch."""

import dataclasses
import functools
import math

import tensorflow as tf

from tf_repvgg.data import image_folder, rand_augment
from tf_repvgg.data.augmentation import CROPS, mixup, pad_and_crop, random_resized_crop
from tf_repvgg.data.preprocessing import Preprocessing
from tf_repvgg.data.sources import TfdsSource

_CACHE_BYTES = 2 * 1024**3
_PARALLEL_CALLS = 2
_PREFETCHED_BATCHES = 4
_EVALUATION_IMAGES = 500
_EVALUATION_BYTES = 64 * 1024**2


class ClassificationData:
    """The splits of one image classification set.

    Args:
      name: "digits" (in this package), "cifar10", or any TFDS set with an image and a label; or "folder:PATH", see
        `ImageFolder`.
      data_dir: TFDS data directory; None for TFDS's own, where a missing set is downloaded. For a folder, where PATH
        starts.
      preprocessing: of every image; its size may be None where the set's images have one size.
      hold_out: True to hold the validation split out of training; False to train on everything but the test split.
      crop: of training images: "pad" to pad the preprocessed image and crop it at random, or "random_resized" to cut
        a random window out of the stored image and resize that (see `tf_repvgg.data.augmentation`).
      crop_padding: pixels that "pad" adds on every side.
      flip: whether half of the training images are mirrored; None for all sets but those known to be of digits or
        letters.
      rand_augment_operations, rand_augment_magnitude: N and M of RandAugment, see `tf_repvgg.data.rand_augment`; 0
        operations for none.
      mixup_alpha: of mixup, see `tf_repvgg.data.augmentation`; 0 for none.
      seed: of shuffling and augmentation.
      bad_images, max_megapixels: see `ImageFolder`; they matter to folders only.

    Attributes:
      name: as given, but without the path to a folder.
      labels: names of the classes, in the order of their numbers.

    The test split is the set's "test", or its "validation" where there is no test. Where validation data are then
    missing, the last tenth of "train" serves.

    Raises:
      ValueError: for an unknown set, one that is no classification of images, a missing image size, or preprocessing
        that does not fit the images; and see `ImageFolder`.
      FileNotFoundError: if `data_dir` is given and does not hold the set, or the folder is missing.
    """

    def __init__(
        self,
        name,
        data_dir=None,
        preprocessing=None,
        hold_out=True,
        crop="pad",
        crop_padding=0,
        flip=None,
        rand_augment_operations=0,
        rand_augment_magnitude=9.0,
        mixup_alpha=0.0,
        seed=0,
        bad_images="refuse",
        max_megapixels=image_folder.MAX_MEGAPIXELS,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop is {crop!r}; known: {', '.join(CROPS)}")
        rand_augment.check(rand_augment_operations, rand_augment_magnitude)
        if not 0 <= mixup_alpha < math.inf:
            raise ValueError(f"mixup's alpha is {mixup_alpha:g}; it must be 0 or more")
        if name.startswith(image_folder.PREFIX):
            self._source = image_folder.ImageFolder(name, data_dir, bad_images, max_megapixels)
        else:
            self._source = TfdsSource(name, data_dir)
        self.name = self._source.name
        self.labels = self._source.labels
        self.seed = seed
        self.hold_out = hold_out
        self._crop = crop
        self._crop_padding = crop_padding
        self._flips = self._source.flips if flip is None else flip
        self._rand_augment = (rand_augment_operations, rand_augment_magnitude) if rand_augment_operations else None
        self._mixup_alpha = mixup_alpha
        *stored_size, self.channels = self._source.image_shape
        if self._rand_augment and self.channels not in (1, 3):
            raise ValueError(
                f"RandAugment is for images of 1 or 3 channels, but those of {name!r} have {self.channels}"
            )
        preprocessing = preprocessing or Preprocessing()
        if preprocessing.size is None:
            if None in stored_size:
                raise ValueError(f"images of dataset {name!r} differ in size; say which to resize to with image_size")
            preprocessing = dataclasses.replace(preprocessing, size=tuple(stored_size))
        preprocessing.check_channels(self.channels)
        self.preprocessing = preprocessing
        self._resizes = preprocessing.resize_shorter_side is not None or preprocessing.size != tuple(stored_size)
        self.splits = _splits(self._source.splits, hold_out)
        if hold_out and not self.num_examples("validation"):
            raise ValueError(
                f"dataset {self.name!r} has too few images to hold a tenth of them out; use --novalidation"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, the length of `labels`."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image that comes out."""
        return (*self.preprocessing.size, self.channels)

    def facts(self) -> dict:
        """What a model trained on these data must be told of to be used: JSON-serializable."""
        facts = {"dataset": self.name, "validation_held_out": self.hold_out}
        return facts | self.preprocessing.facts() | {"labels": list(self.labels)}

    def num_examples(self, split: str) -> int:
        """Number of images in "train", "validation" or "test"."""
        return self._source.num_examples(self.splits[split])

    def images(self, split: str) -> tf.data.Dataset:
        """(uint8 image, int64 label) of a split in its stored order, resized, cached if small."""
        dataset = self._source.encoded(self.splits[split]).with_options(_options())
        dataset = dataset.map(self._decode_and_resize, num_parallel_calls=_PARALLEL_CALLS)
        return dataset.cache() if self._fits_cache(split) else dataset

    def evaluation(self, split: str, batch_size: int | None = None) -> tf.data.Dataset:
        """Batches (float32 images, labels), every image of the split once, in order, not augmented.

        By default 500 images in a batch, fewer where they are large.
        """
        batches = self.images(split).batch(batch_size or self.evaluation_batch_size)
        return batches.map(lambda images, labels: (self.preprocessing(images), labels)).prefetch(_PREFETCHED_BATCHES)

    @property
    def evaluation_batch_size(self) -> int:
        """Images in a batch of `evaluation`: 500, or as many as take 64 MiB."""
        height, width, channels = self.image_shape
        return max(1, min(_EVALUATION_IMAGES, _EVALUATION_BYTES // (4 * height * width * channels)))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one pass over the training split.

        Raises:
          ValueError: if there is none.
        """
        count = self.num_examples("train")
        if count < batch_size:
            raise ValueError(f"batch size {batch_size} is larger than the {count} training images of {self.name!r}")
        return count // batch_size

    def training(
        self,
        batch_size: int,
        epochs: range,
        image_size: int | None = None,
        steps_per_epoch: int | None = None,
        first_step: int = 0,
    ) -> tf.data.Dataset:
        """Augmented, shuffled batches of the given epochs.

        Order and augmentation depend on seed, epoch and step alone, so a run that continues anywhere sees what an
        uninterrupted one would have seen. Labels are integers [batch], or with mixup probabilities [batch, classes].

        Args:
          batch_size: images in a batch.
          epochs: numbers of the epochs, from 0.
          image_size: height and width of the crops, where they are not to be those of the images: smaller ones are
            cheaper to train on.
          steps_per_epoch: batches of each epoch, where they are not to be all.
          first_step: number of the step, from 0, that the first epoch starts with; the batches before are left out.
        """
        size = (image_size, image_size) if image_size else self.preprocessing.size
        steps = steps_per_epoch or self.steps_per_epoch(batch_size)
        one_epoch = self._random_resized_crops if self._crop == "random_resized" else self._padded_crops
        batches = []
        for epoch in epochs:
            skipped = first_step if epoch == epochs.start else 0
            seed = 1000 * self.seed + epoch  # shared with no epoch of the next seeds
            cropped = one_epoch(batch_size, size, seed, skipped).take(steps - skipped)
            batches.append(self._finished(cropped, seed, skipped))
        dataset = functools.reduce(tf.data.Dataset.concatenate, batches).with_options(_options())
        return dataset.prefetch(_PREFETCHED_BATCHES)

    def calibration(self, count: int, split: str = "train") -> tf.data.Dataset:
        """The first `count` images of a split, normalised, one by one: what activation ranges are measured on.

        Raises:
          ValueError: if the split has fewer images.
        """
        if count > self.num_examples(split):
            raise ValueError(f"{count} calibration images asked for, but {split!r} has {self.num_examples(split)}")
        return self.images(split).take(count).map(lambda image, _: self.preprocessing(image))

    def _fits_cache(self, split):
        height, width, channels = self.image_shape
        return self.num_examples(split) * height * width * channels <= _CACHE_BYTES

    def _decode_and_resize(self, encoded, label):
        image = self._source.decode(encoded)
        if self._resizes:
            image = tf.ensure_shape(self.preprocessing.resize(image), self.image_shape)
        return image, label

    @functools.cached_property
    def _cached_training_images(self):
        """One cache, shared by all epochs."""
        return self.images("train")

    def _padded_crops(self, batch_size, size, seed, skipped):
        """An epoch of batches that are cropped as wholes, from the cache if there is one."""
        # Smaller crops move over the image by themselves.
        padding = self._crop_padding if size == self.preprocessing.size else 0
        if self._fits_cache("train"):
            examples = self._cached_training_images.shuffle(
                # Iterating again gives the same order: Keras may start an iterator, drop it, and start another.
                min(self.num_examples("train"), 50_000),
                seed=seed,
                reshuffle_each_iteration=False,
            )
        else:
            examples = self._source.encoded(self.splits["train"], shuffle_seed=seed)
            examples = examples.map(self._decode_and_resize, num_parallel_calls=_PARALLEL_CALLS)
        batches = examples.batch(batch_size, drop_remainder=True).enumerate().skip(skipped)
        return batches.map(
            lambda index, batch: (pad_and_crop(batch[0], size, padding, self._flips, [seed, index]), batch[1]),
            num_parallel_calls=_PARALLEL_CALLS,
        )

    def _random_resized_crops(self, batch_size, size, seed, skipped):
        """An epoch of batches whose images are decoded anew, as far as they are needed."""
        examples = self._source.encoded(self.splits["train"], shuffle_seed=seed)
        examples = examples.enumerate().skip(skipped * batch_size)
        cropped = examples.map(
            lambda index, example: (
                random_resized_crop(example[0], self._source.decode, self.channels, size, self._flips, [seed, index]),
                example[1],
            ),
            num_parallel_calls=_PARALLEL_CALLS,
        )
        return cropped.batch(batch_size, drop_remainder=True)

    def _finished(self, batches, seed, first_step):
        """What follows cropping, batch by batch: RandAugment, normalization, mixup."""

        def finish(step, batch):
            images, labels = batch
            if self._rand_augment:
                images = rand_augment.rand_augment(images, *self._rand_augment, [seed, step])
            images = self.preprocessing(images)
            if self._mixup_alpha:
                images, labels = mixup(images, labels, self.num_classes, self._mixup_alpha, [seed, step])
            return images, labels

        return batches.enumerate(first_step).map(finish, num_parallel_calls=_PARALLEL_CALLS)


def _options():
    """No autotuning: its thread sleeps up to a minute at a time, and whoever drops an iterator waits for it to wake.

    (TensorFlow 2.21: an epoch's end, or a short evaluation, takes 10 s.)
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _splits(available, hold_out):
    if "test" in available or "validation" in available:
        test = "test" if "test" in available else "validation"
    else:
        raise ValueError(f"the dataset has no test or validation split, but {', '.join(available)}")
    if "validation" in available and test != "validation":
        train, validation = "train", "validation"
        everything = "train+validation"
    else:
        train, validation, everything = "train[:90%]", "train[90%:]", "train"
    return {"train": train if hold_out else everything, "validation": validation, "test": test}
