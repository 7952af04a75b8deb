"""Augmented, shuffled batches of training images: crop, RandAugment, normalize, mixup."""

import functools

import tensorflow as tf

from tf_repvgg.data import rand_augment
from tf_repvgg.data.augmentation import Augmentation, mixup, pad_and_crop, random_resized_crop
from tf_repvgg.data.image_split import PARALLEL_CALLS, ImageSplit, without_autotuning
from tf_repvgg.data.preprocessing import Preprocessing


class TrainingBatches:
    """Batches of a training split that depend on seed, epoch and step alone.

    Args:
      images: Training split.
      preprocessing: Normalization of the images.
      augmentation: Settings of the augmentation.
      num_classes: Number of classes.
      seed: Seed of shuffling and augmentation.
    """

    def __init__(
        self,
        images: ImageSplit,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        num_classes: int,
        seed: int,
    ) -> None:
        self._images = images
        self._preprocessing = preprocessing
        self._augmentation = augmentation
        self._num_classes = num_classes
        self._seed = seed

    def epochs(
        self, batch_size: int, epochs: range, image_size: int | None, steps_per_epoch: int, first_step: int
    ) -> tf.data.Dataset:
        """Batches of the given epochs, see `ClassificationData.training`."""
        size = (image_size, image_size) if image_size else self._images.image_shape[:2]
        datasets = []
        for epoch in epochs:
            skipped = first_step if epoch == epochs.start else 0
            seed = 1000 * self._seed + epoch  # no epoch of the next seeds has the same
            crop = self._cut_windows if self._augmentation.crop == "random_resized" else self._pad_and_crop
            batches = crop(batch_size, size, seed, skipped).take(steps_per_epoch - skipped)
            datasets.append(self._finish(batches, seed, skipped))
        return functools.reduce(tf.data.Dataset.concatenate, datasets).with_options(without_autotuning())

    def _pad_and_crop(self, batch_size, size, seed, skipped):
        """One epoch of batches, each cropped as a whole."""
        # Smaller crops vary in place without padding.
        padding = self._augmentation.crop_padding if size == self._images.image_shape[:2] else 0
        examples = self._images.shuffle_images(seed)
        batches = examples.batch(batch_size, drop_remainder=True).enumerate().skip(skipped)

        def crop(step, batch):
            images, labels = batch
            return pad_and_crop(images, size, padding, self._augmentation.flip, [seed, step]), labels

        return batches.map(crop, num_parallel_calls=PARALLEL_CALLS)

    def _cut_windows(self, batch_size, size, seed, skipped):
        """One epoch of batches whose images are decoded anew, and only as far as needed."""
        channels = self._images.image_shape[-1]

        def crop(index, example):
            content, label = example
            flip = self._augmentation.flip
            return random_resized_crop(content, self._images.decode, channels, size, flip, [seed, index]), label

        examples = self._images.read_encoded(shuffle_seed=seed).enumerate().skip(skipped * batch_size)
        return examples.map(crop, num_parallel_calls=PARALLEL_CALLS).batch(batch_size, drop_remainder=True)

    def _finish(self, batches, seed, first_step):
        """The steps after cropping, batch by batch: RandAugment, normalization, mixup."""
        settings = self._augmentation

        def finish(step, batch):
            images, labels = batch
            if settings.rand_augment_operations:
                images = rand_augment.rand_augment(
                    images, settings.rand_augment_operations, settings.rand_augment_magnitude, [seed, step]
                )
            images = self._preprocessing(images)
            if settings.mixup_alpha:
                images, labels = mixup(images, labels, self._num_classes, settings.mixup_alpha, [seed, step])
            return images, labels

        return batches.enumerate(first_step).map(finish, num_parallel_calls=PARALLEL_CALLS)
