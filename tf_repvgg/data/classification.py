"""Image classification datasets: their splits, and batches for evaluation, calibration and training."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tf_repvgg.data import image_folder
from tf_repvgg.data.augmentation import Augmentation
from tf_repvgg.data.class_numbers import ClassNumbers, NumberedSource
from tf_repvgg.data.image_split import ImageSource, ImageSplit
from tf_repvgg.data.preprocessing import Preprocessing
from tf_repvgg.data.shards import WHOLE, Shard
from tf_repvgg.data.training_batches import TrainingBatches

_PREFETCHED_BATCHES = 4
_EVALUATION_IMAGES = 500
# A network needs many times the memory of its input.
_EVALUATION_BYTES = 8 * 1024**2


class ClassificationData:
    """The splits of an image classification dataset.

    The test split is the dataset's "test", or its "validation" if there is no test. If that leaves no validation data,
    the last tenth of "train" is held out.

    Args:
      name: Name of the dataset: "digits" (in this package), "cifar10", or any TFDS dataset with an image and a label;
        or "folder:PATH", see `ImageFolder`.
      data_dir: TFDS data directory; None for TFDS's own, where a missing dataset is downloaded. For a folder, the
        directory that PATH is relative to.
      preprocessing: Preprocessing of every image; its size may be None if the images of the dataset have one size.
      hold_out: True to hold the validation split out of training; False to train on everything but the test split.
      crop: Kind of the random crops of training images: "pad" pads the preprocessed image and crops it at random,
        "random_resized" cuts a random window out of the stored image and resizes it.
      crop_padding: Pixels that "pad" adds on every side.
      flip: Whether half of the training images are mirrored; None for all datasets except those known to be of digits
        or letters.
      rand_augment_operations: Number of operations of RandAugment per image; 0 for none.
      rand_augment_magnitude: Strength of the operations of RandAugment, from 0 to 30.
      mixup_alpha: Alpha of mixup; 0 for none.
      seed: Seed of shuffling and augmentation.
      bad_images: Treatment of unusable images in a folder, see `ImageFolder`.
      max_megapixels: Largest usable image in a folder, see `ImageFolder`.
      class_numbers: Numbers of the classes of a network that is used on the dataset, which may have only some of them,
        and others in each split; None to number the classes of the dataset.

    Attributes:
      name: Name as given, but without the path to a folder.
      labels: Names of the classes, in the order of their numbers.
      splits: Part of the dataset that "train", "validation" and "test" stand for, as TFDS writes it: "train[:90%]".
      channels: Number of channels of the images.
      preprocessing: Preprocessing of every image, with its size.
      hold_out: Whether the validation split is held out of training.
      seed: Seed of shuffling and augmentation.

    Raises:
      ValueError: If the dataset is unknown, is not for image classification, or needs an image size; if an argument is
        out of range, or the preprocessing does not fit the images; and see `ImageFolder`.
      FileNotFoundError: If `data_dir` is given and does not contain the dataset, or the folder is missing.

    Example:
      >>> from tf_repvgg.data import ClassificationData
      >>> digits = ClassificationData("digits", hold_out=False)
      >>> digits.image_shape, digits.num_classes, digits.num_examples("train")
      ((8, 8, 1), 10, 1437)
      >>> images, labels = next(iter(digits.training(batch_size=32, epochs=range(1))))
      >>> images.shape, labels.shape
      (TensorShape([32, 8, 8, 1]), TensorShape([32]))
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None = None,
        preprocessing: Preprocessing | None = None,
        hold_out: bool = True,
        crop: str = "pad",
        crop_padding: int = 0,
        flip: bool | None = None,
        rand_augment_operations: int = 0,
        rand_augment_magnitude: float = 9.0,
        mixup_alpha: float = 0.0,
        seed: int = 0,
        bad_images: str = "refuse",
        max_megapixels: float = image_folder.MAX_MEGAPIXELS,
        class_numbers: ClassNumbers | None = None,
    ) -> None:
        # Refuses bad settings before it looks at the dataset, which may take long.
        augmentation = Augmentation(
            crop, crop_padding, bool(flip), rand_augment_operations, rand_augment_magnitude, mixup_alpha
        )
        source = _find_source(name, data_dir, bad_images, max_megapixels, class_numbers)
        self.name = source.name
        self.labels = source.labels
        self.seed = seed
        self.hold_out = hold_out
        height, width, self.channels = source.image_shape
        if augmentation.rand_augment_operations and self.channels not in (1, 3):
            raise ValueError(
                f"RandAugment needs images of 1 or 3 channels, but those of {name!r} have {self.channels} channels"
            )
        preprocessing = preprocessing or Preprocessing()
        if preprocessing.size is None:
            if height is None or width is None:
                raise ValueError(f"images of dataset {name!r} differ in size; give the size to resize them to")
            preprocessing = dataclasses.replace(preprocessing, size=(height, width))
        preprocessing.check_channels(self.channels)
        self.preprocessing = preprocessing
        self.splits = _choose_splits(source, hold_out)
        self._images = {
            split: ImageSplit(source, stored_split, preprocessing) for split, stored_split in self.splits.items()
        }
        if hold_out and not self.num_examples("validation"):
            raise ValueError(
                f"dataset {self.name!r} has too few images to hold a tenth of them out; use --novalidation"
            )
        if flip is None:
            augmentation = dataclasses.replace(augmentation, flip=source.flips)
        self._training = TrainingBatches(self._images["train"], preprocessing, augmentation, self.num_classes, seed)

    @property
    def num_classes(self) -> int:
        """Number of classes, the length of `labels`."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every preprocessed image."""
        return self._images["train"].image_shape

    def metadata(self) -> dict[str, Any]:
        """What users of a model that is trained on these data need to know: JSON-serializable."""
        metadata = {"dataset": self.name, "validation_held_out": self.hold_out}
        return metadata | self.preprocessing.metadata() | {"labels": list(self.labels)}

    def num_examples(self, split: str) -> int:
        """Number of images in "train", "validation" or "test"."""
        return len(self._images[split])

    def images(self, split: str) -> tf.data.Dataset:
        """Images (uint8) and labels (int64) of a split in their stored order, resized, cached if they are few."""
        return self._images[split].images()

    def evaluation(self, split: str, batch_size: int | None = None, shard: Shard = WHOLE) -> tf.data.Dataset:
        """Batches of normalized images and labels: every image of a split once, in order, not augmented.

        Args:
          split: "train", "validation" or "test".
          batch_size: Images in a batch; by default `evaluation_batch_size`.
          shard: Replicas of this process. Of each batch, the parts of its replicas follow each other.
        """
        batch_size = batch_size or self.evaluation_batch_size
        if shard.is_whole:
            batches = self.images(split).batch(batch_size)
        else:
            # Batches of about one size, so that no replica is without an image in the last one.
            borders = np.linspace(0, self.num_examples(split), self.evaluation_steps(split, batch_size) + 1)
            is_computed, sizes = shard.split(np.diff(borders.astype(int)).tolist())
            batches = self._images[split].images(is_computed).batch(batch_size).rebatch(list(sizes))
        return batches.map(lambda images, labels: (self.preprocessing(images), labels)).prefetch(_PREFETCHED_BATCHES)

    def evaluation_steps(self, split: str, batch_size: int | None = None) -> int:
        """Number of batches of `evaluation`.

        Args:
          split: "train", "validation" or "test".
          batch_size: Images in a batch; by default `evaluation_batch_size`.
        """
        return -(-self.num_examples(split) // (batch_size or self.evaluation_batch_size))

    @property
    def evaluation_batch_size(self) -> int:
        """Images in a batch of `evaluation`: 500, or as many as take 8 MiB."""
        height, width, channels = self.image_shape
        return max(1, min(_EVALUATION_IMAGES, _EVALUATION_BYTES // (4 * height * width * channels)))

    def steps_per_epoch(self, batch_size: int, drop_remainder: bool = True) -> int:
        """Number of batches in one pass over the training split.

        Args:
          batch_size: Images in a batch.
          drop_remainder: Whether images that fill no batch are left out; otherwise they are the last batch.

        Raises:
          ValueError: If there is no full batch.
        """
        count = self.num_examples("train")
        if count < batch_size:
            raise ValueError(f"batch size {batch_size} is larger than the {count} training images of {self.name!r}")
        return count // batch_size if drop_remainder else -(-count // batch_size)

    def check_replicas(
        self, replicas: int, batch_size: int, drop_remainder: bool, evaluated_split: str | None = None
    ) -> None:
        """Checks that every batch can be split over replicas.

        Args:
          replicas: Number of replicas.
          batch_size: Images in a batch, for all replicas together.
          drop_remainder: Whether images that fill no batch are left out.
          evaluated_split: Split that is evaluated on the replicas, too; None for none.

        Raises:
          ValueError: If a batch cannot be split.
        """
        if batch_size % replicas:
            raise ValueError(
                f"batch size {batch_size} cannot be split evenly over {replicas} replicas; give a multiple of "
                f"{replicas}"
            )
        remainder = self.num_examples("train") % batch_size
        smallest = [remainder] if remainder and not drop_remainder else []
        if evaluated_split:
            smallest.append(self.num_examples(evaluated_split) // self.evaluation_steps(evaluated_split))
        for size in smallest:
            if size < replicas:
                raise ValueError(
                    f"a batch of {size} image{'s' * (size != 1)} cannot be split over {replicas} replicas; choose "
                    "another batch size, drop the remainder, or train on fewer replicas"
                )

    def training(
        self,
        batch_size: int,
        epochs: range,
        image_size: int | None = None,
        steps_per_epoch: int | None = None,
        first_step: int = 0,
        drop_remainder: bool = True,
        shard: Shard = WHOLE,
    ) -> tf.data.Dataset:
        """Augmented, shuffled batches of the given epochs.

        Order and augmentation depend on seed, epoch and step alone, so a run that continues anywhere sees the batches
        of an uninterrupted one. Labels are integers [batch], or with mixup probabilities [batch, classes].

        Where several replicas train together, batches and crops are those of a single one, whatever the number of
        replicas. RandAugment and mixup draw anew for each replica, and mixup mixes images of the same replica.

        Args:
          batch_size: Images in a batch, for all replicas together.
          epochs: Numbers of the epochs, from 0.
          image_size: Height and width of the crops; by default those of the images. Smaller crops take less time to
            train on.
          steps_per_epoch: Batches of each epoch; by default all.
          first_step: Step, from 0, at which the first epoch starts; earlier batches are skipped.
          drop_remainder: Whether images that fill no batch are left out of an epoch, which shuffling chooses anew for
            each epoch; otherwise they are its last batch.
          shard: Replicas of this process. Of each batch, the parts of its replicas follow each other.

        Raises:
          ValueError: If a batch cannot be split over the replicas.
        """
        self.check_replicas(shard.total, batch_size, drop_remainder)
        steps = steps_per_epoch or self.steps_per_epoch(batch_size, drop_remainder)
        batches = self._training.epochs(batch_size, epochs, image_size, steps, first_step, drop_remainder, shard)
        return batches.prefetch(_PREFETCHED_BATCHES)

    def calibration(self, count: int, split: str = "train") -> tf.data.Dataset:
        """The first images of a split, normalized, one by one, to calibrate activation ranges on.

        Args:
          count: Number of images.
          split: "train", "validation" or "test".

        Raises:
          ValueError: If the split has fewer images.
        """
        if count > self.num_examples(split):
            raise ValueError(f"{count} calibration images were requested, but {split!r} has {self.num_examples(split)}")
        return self.images(split).take(count).map(lambda image, _: self.preprocessing(image))

    def first_batches(self, count: int, split: str = "train") -> tf.data.Dataset:
        """The first images of a split, or all if there are fewer, normalized, in batches for evaluation.

        Args:
          count: Number of images.
          split: "train", "validation" or "test".
        """
        return self.calibration(min(count, self.num_examples(split)), split).batch(self.evaluation_batch_size)


def _find_source(name, data_dir, bad_images, max_megapixels, class_numbers) -> ImageSource:
    source: ImageSource
    if name.startswith(image_folder.PREFIX):
        splits_may_differ = class_numbers is not None
        source = image_folder.ImageFolder(name, data_dir, bad_images, max_megapixels, splits_may_differ)
    else:
        from tf_repvgg.data.sources import TfdsSource  # imports TFDS, which takes seconds

        source = TfdsSource(name, data_dir)
    return source if class_numbers is None else NumberedSource(source, class_numbers)


def _choose_splits(source, hold_out):
    """{"train", "validation" and "test": part of the dataset as TFDS writes it}."""
    available = source.splits
    if "test" in available or "validation" in available:
        test = "test" if "test" in available else "validation"
    else:
        raise ValueError(f"dataset {source.name!r} has no test or validation split, but {', '.join(available)}")
    if "validation" in available and test != "validation":
        train, validation = "train", "validation"
        everything = "train+validation"
    else:
        train, validation, everything = "train[:90%]", "train[90%:]", "train"
    return {"train": train if hold_out else everything, "validation": validation, "test": test}
