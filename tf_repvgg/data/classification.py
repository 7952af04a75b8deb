"""From a TFDS name to batches: decode, augment, normalise, cache, shuffle, batch, prefetch."""

import dataclasses
import functools

import tensorflow as tf
import tensorflow_datasets as tfds

from tf_repvgg.data.digits import Digits

_CACHE_BYTES = 2 * 1024**3
_PARALLEL_CALLS = 2
_PREFETCHED_BATCHES = 4
# Mirrored digits are other shapes, not other pictures of the same digit.
_NO_FLIP = frozenset({"digits", "mnist", "mnist_corrupted", "svhn_cropped", "emnist", "kmnist"})


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model expects: ``(pixel - mean) / std`` on pixels 0 to 255, resized to `size`.

    The default maps pixels to -1 .. 127/128. Calibrated on images with black and white pixels that is scale 1/128 and
    zero point 0, so that the int8 input of an exported model is just the pixel minus 128.
    """

    size: tuple[int, int]
    mean: float = 128.0
    std: float = 128.0

    def __call__(self, images):
        """uint8 or float images [..., height, width, channels] to normalised float32 ones, not resized."""
        return (tf.cast(images, tf.float32) - self.mean) / self.std


class ClassificationData:
    """The splits of one TFDS classification set.

    Args:
      name: "digits" (in this package), "cifar10", or any TFDS set with an image and a label.
      data_dir: TFDS data directory; None for TFDS's own, where a missing set is downloaded.
      image_size: (height, width) to resize to; None where the set's images have one size.
      hold_out: True to hold the validation split out of training; False to train on everything but the test split.
      crop_padding: pixels that training images are padded by on every side before they are cropped at random.
      seed: of shuffling and augmentation.

    The test split is the set's "test", or its "validation" where there is no test. Where validation data are then
    missing, the last tenth of "train" serves.

    Raises:
      ValueError: for an unknown set, one that is no classification of images, or a missing image size.
      FileNotFoundError: if `data_dir` is given and does not hold the set.
    """

    def __init__(self, name, data_dir=None, image_size=None, hold_out=True, crop_padding=0, seed=0):
        self.name = name
        self.seed = seed
        self._crop_padding = crop_padding
        self._builder = _builder(name, data_dir)
        self._flips = self._builder.name not in _NO_FLIP
        info = self._builder.info
        if not {"image", "label"} <= set(info.features or {}):
            raise ValueError(f"dataset {name!r} has no image and label, but {', '.join(info.features)}")
        self.num_classes = info.features["label"].num_classes
        height, width, self.channels = info.features["image"].shape
        self._resizes = image_size is not None and tuple(image_size) != (height, width)
        if image_size is None and None in (height, width):
            raise ValueError(f"images of dataset {name!r} differ in size; say which to resize to with image_size")
        self.preprocessing = Preprocessing(tuple(image_size) if self._resizes else (height, width))
        self.hold_out = hold_out
        self.splits = _splits(info.splits, hold_out)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image that comes out."""
        return (*self.preprocessing.size, self.channels)

    def num_examples(self, split: str) -> int:
        """Number of images in "train", "validation" or "test"."""
        return self._builder.info.splits[self.splits[split]].num_examples

    def images(self, split: str) -> tf.data.Dataset:
        """(uint8 image, int64 label) of a split in its stored order, resized, cached if small."""
        dataset = self._builder.as_dataset(self.splits[split], as_supervised=True).with_options(_options())
        if self._resizes:
            dataset = dataset.map(self._resize, num_parallel_calls=_PARALLEL_CALLS)
        height, width, channels = self.image_shape
        if self.num_examples(split) * height * width * channels <= _CACHE_BYTES:
            dataset = dataset.cache()
        return dataset

    def evaluation(self, split: str, batch_size: int) -> tf.data.Dataset:
        """Batches (float32 images, labels), every image of the split once, in order, not augmented."""
        dataset = self.images(split).batch(batch_size)
        return dataset.map(lambda images, labels: (self.preprocessing(images), labels)).prefetch(_PREFETCHED_BATCHES)

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
        self, batch_size: int, epochs: range, image_size: int | None = None, first_step: int = 0
    ) -> tf.data.Dataset:
        """Augmented, shuffled batches of the given epochs, `steps_per_epoch` for each.

        Order and augmentation depend on seed, epoch and step alone, so a run that continues anywhere sees what an
        uninterrupted one would have seen.

        Args:
          batch_size: images in a batch.
          epochs: numbers of the epochs, from 0.
          image_size: height and width of the crops, where they are not to be those of the images: smaller ones are
            cheaper to train on.
          first_step: number of the step, from 0, that the first epoch starts with; the batches before are left out.
        """
        height, width = (image_size, image_size) if image_size else self.preprocessing.size
        count = self.num_examples("train")
        images = self.images("train")

        def one_epoch(epoch):
            epoch_seed = 1000 * self.seed + epoch  # shared with no epoch of the next seeds
            # Iterating again gives the same order: Keras may start an iterator, drop it, and start another.
            shuffled = images.shuffle(min(count, 50_000), seed=epoch_seed, reshuffle_each_iteration=False)
            batches = shuffled.batch(batch_size, drop_remainder=True)
            return (
                batches.enumerate()
                .skip(first_step if epoch == epochs.start else 0)
                .map(
                    lambda index, batch: (
                        self._augment(batch[0], height, width, [epoch_seed, index]),
                        batch[1],
                    ),
                    num_parallel_calls=_PARALLEL_CALLS,
                )
            )

        batches = functools.reduce(tf.data.Dataset.concatenate, map(one_epoch, epochs))
        return batches.map(lambda x, y: (self.preprocessing(x), y)).prefetch(_PREFETCHED_BATCHES)

    def calibration(self, count: int, split: str = "train") -> tf.data.Dataset:
        """The first `count` images of a split, normalised, one by one: what activation ranges are measured on.

        Raises:
          ValueError: if the split has fewer images.
        """
        if count > self.num_examples(split):
            raise ValueError(f"{count} calibration images asked for, but {split!r} has {self.num_examples(split)}")
        return self.images(split).take(count).map(lambda image, _: self.preprocessing(image))

    def _resize(self, image, label):
        resized = tf.image.resize(image, self.preprocessing.size, antialias=True)
        return tf.cast(tf.round(tf.clip_by_value(resized, 0, 255)), tf.uint8), label

    def _augment(self, images, height, width, seed):
        """Pads a batch, crops each image at random, and flips it where a mirrored class is the same.

        On whole batches: per image, these few small operations took a tenth of a training step.
        """
        # Smaller crops move over the image by themselves.
        padding = self._crop_padding if (height, width) == self.preprocessing.size else 0
        padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
        count, padded_height, padded_width, _ = tf.unstack(tf.shape(padded))
        draws = tf.random.stateless_uniform([3, count, 1], seed)
        offsets = tf.cast(tf.stack([padded_height - height + 1, padded_width - width + 1]), tf.float32)
        top, left = tf.unstack(tf.cast(draws[:2] * offsets[:, tf.newaxis, tf.newaxis], tf.int32))
        rows = tf.gather(padded, top + tf.range(height), batch_dims=1, axis=1)
        columns = left + tf.range(width)
        if self._flips:
            columns = tf.where(draws[2] < 0.5, columns, columns[:, ::-1])
        return tf.gather(rows, columns, batch_dims=1, axis=2)


def _options():
    """No autotuning: its thread sleeps up to a minute at a time, and whoever drops an iterator waits for it to wake.

    (TensorFlow 2.21: an epoch's end, or a short evaluation, takes 10 s.)
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def _builder(name, data_dir):
    if name == Digits.name:
        builder = Digits(data_dir=data_dir)
        builder.download_and_prepare()
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, AssertionError):  # the latter for versions it does not have
        raise ValueError(f"dataset {name!r} is not in TFDS; known here: digits, cifar10, or any TFDS name") from None
    if not builder.is_prepared():
        if data_dir is not None:
            raise FileNotFoundError(
                f"data_dir {data_dir!r} does not hold the dataset {name!r} (looked for {builder.data_path}); "
                "point it at a TFDS directory that does, or leave it out to download the set"
            )
        builder.download_and_prepare()
    return builder


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
