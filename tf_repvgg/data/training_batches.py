"""Augmented, shuffled batches of training images: crop, RandAugment, normalize, mixup."""

import functools

import tensorflow as tf

from tf_repvgg.data import rand_augment
from tf_repvgg.data.augmentation import Augmentation, draw_crops, mixup, pad_and_crop, random_resized_crop
from tf_repvgg.data.image_split import PARALLEL_CALLS, ImageSplit, without_autotuning
from tf_repvgg.data.preprocessing import Preprocessing
from tf_repvgg.data.shards import Shard


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
        self,
        batch_size: int,
        epochs: range,
        image_size: int | None,
        steps_per_epoch: int,
        first_step: int,
        drop_remainder: bool,
        shard: Shard,
    ) -> tf.data.Dataset:
        """Batches of the given epochs, see `ClassificationData.training`."""
        size = (image_size, image_size) if image_size else self._images.image_shape[:2]
        datasets = []
        for epoch in epochs:
            skipped = first_step if epoch == epochs.start else 0
            seed = 1000 * self._seed + epoch  # no epoch of the next seeds has the same
            crop = self._cut_windows if self._augmentation.crop == "random_resized" else self._pad_and_crop
            batches = crop(batch_size, size, seed, skipped, drop_remainder, shard).take(steps_per_epoch - skipped)
            batches = self._split(batches, batch_size, skipped, drop_remainder, shard)
            datasets.append(self._finish(batches, seed, skipped, shard))
        return functools.reduce(tf.data.Dataset.concatenate, datasets).with_options(without_autotuning())

    def _pad_and_crop(self, batch_size, size, seed, skipped, drop_remainder, shard):
        """One epoch of batches, of which the images of this process are cropped together."""
        # Smaller crops vary in place without padding.
        padding = self._augmentation.crop_padding if size == self._images.image_shape[:2] else 0
        examples = self._images.shuffle_images(seed)
        batches = examples.batch(batch_size, drop_remainder).enumerate().skip(skipped)

        def crop(step, batch):
            images, labels = batch
            count = batch_size if drop_remainder else tf.shape(images)[0]
            first, end = shard.bounds(count)
            # Those of the whole batch, so that an image has the same crop whichever process computes it.
            draws = draw_crops(count, [seed, step])[:, first:end]
            return pad_and_crop(images[first:end], size, padding, self._augmentation.flip, draws), labels[first:end]

        return batches.map(crop, num_parallel_calls=PARALLEL_CALLS)

    def _cut_windows(self, batch_size, size, seed, skipped, drop_remainder, shard):
        """One epoch of batches whose images are decoded anew, and only as far as needed."""
        channels = self._images.image_shape[-1]

        def crop(index, example):
            reference, label = example
            content, flip = self._images.read(reference), self._augmentation.flip
            return random_resized_crop(content, self._images.decode, channels, size, flip, [seed, index]), label

        examples = self._images.list_examples(shuffle_seed=seed).enumerate().skip(skipped * batch_size)
        if not shard.is_whole:
            is_computed = tf.constant(shard.split(self._batch_sizes(batch_size, drop_remainder))[0])
            examples = examples.take(len(is_computed) - skipped * batch_size)
            examples = examples.filter(lambda index, _: is_computed[index])
        first, end = shard.bounds(batch_size)
        return examples.map(crop, num_parallel_calls=PARALLEL_CALLS).batch(end - first, drop_remainder)

    def _split(self, batches, batch_size, skipped, drop_remainder, shard):
        """Splits the batches of this process into those of its replicas, which follow each other."""
        if len(shard.replicas) == 1:
            return batches
        if drop_remainder:  # all of one size, which TPUs need to know
            return batches.rebatch(batch_size // shard.total, drop_remainder=True)
        _, sizes = shard.split(self._batch_sizes(batch_size, drop_remainder))
        return batches.rebatch(list(sizes[skipped * len(shard.replicas) :]))

    def _batch_sizes(self, batch_size, drop_remainder):
        """The number of images in each batch of an epoch, for all processes."""
        full, remainder = divmod(len(self._images), batch_size)
        return [batch_size] * full + [remainder] * (remainder > 0 and not drop_remainder)

    def _finish(self, batches, seed, first_step, shard):
        """The steps after cropping, replica by replica: RandAugment, normalization, mixup."""
        settings = self._augmentation

        def finish(number, batch):
            images, labels = batch
            step, own = number // len(shard.replicas), number % len(shard.replicas)
            seeds = [seed, step * shard.total + shard.replicas.start + own]  # of this step on this replica alone
            if settings.rand_augment_operations:
                images = rand_augment.rand_augment(
                    images, settings.rand_augment_operations, settings.rand_augment_magnitude, seeds
                )
            images = self._preprocessing(images)
            if settings.mixup_alpha:
                images, labels = mixup(images, labels, self._num_classes, settings.mixup_alpha, seeds)
            return images, labels

        first = first_step * len(shard.replicas)
        return batches.enumerate(first).map(finish, num_parallel_calls=PARALLEL_CALLS)
