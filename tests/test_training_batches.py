"""Training batches: augmented and shuffled, depending on seed, epoch and step alone."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers.datasets import (
    IMAGE,
    assert_same_batches,
    hashable,
    read_all,
    read_epochs,
    write_dataset,
    write_pictures,
)

from tf_repvgg.data import ClassificationData, Preprocessing, image_split
from tf_repvgg.data.augmentation import random_resized_crop

BRIGHT_LEFT = np.repeat(np.uint8([200, 200, 200, 0, 0, 0]), 3).reshape(1, 6, 3).repeat(6, axis=0)


@pytest.fixture(scope="module")
def held_out():
    return ClassificationData("digits", hold_out=True, crop_padding=1)


@pytest.fixture(scope="module", params=["jpeg", "png"])
def pictures(request, tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp(request.param), request.param)


def test_training_batches_depend_on_seed_and_epoch_alone(held_out):
    steps = held_out.steps_per_epoch(256)
    assert steps == held_out.num_examples("train") // 256 == 5
    three = read_epochs(held_out, 3)
    again = ClassificationData("digits", hold_out=True, crop_padding=1)
    assert_same_batches(three, read_epochs(again, 3))
    # Continuing at an epoch gives what an uninterrupted run would have seen.
    assert_same_batches(three[steps:], read_epochs(again, 3, first_epoch=1))
    assert_same_batches(three[2 * steps :], read_epochs(again, 3, first_epoch=2))
    # Also within an epoch, and when an iterator has been dropped before.
    dataset = again.training(256, range(1, 3), first_step=2)
    next(iter(dataset))
    assert_same_batches(three[steps + 2 :], list(dataset.as_numpy_iterator()))
    # Epochs differ, and so do seeds.
    assert not np.array_equal(three[0][1], three[steps][1])
    other = read_epochs(ClassificationData("digits", hold_out=True, crop_padding=1, seed=1), 1)
    assert not np.array_equal(three[0][1], other[0][1])


def test_an_epoch_shows_every_image_at_most_once(held_out):
    _, train_labels = read_all(held_out.images("train"))
    labels = np.concatenate([labels for _, labels in read_epochs(held_out, 1)])
    assert np.all(np.bincount(labels, minlength=10) <= np.bincount(train_labels, minlength=10))
    assert len(labels) == 5 * 256


def test_augmentation_crops_from_a_padded_image(held_out):
    """Digits are padded by one pixel, shifted by -1, 0 or 1, and never mirrored."""
    originals, labels = read_all(held_out.images("train"))
    padded = np.pad(originals, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = {
        padded[:, top : top + 8, left : left + 8].tobytes()[index * 64 : index * 64 + 64]: (labels[index], top, left)
        for top in range(3)
        for left in range(3)
        for index in range(len(originals))
    }
    shifts = []
    for images, batch_labels in read_epochs(held_out, 1):
        pixels = (images * 128 + 128).astype(np.uint8)
        for image, label in zip(pixels, batch_labels, strict=True):
            window_label, *shift = windows[image.tobytes()]  # KeyError: not a crop of any training image
            assert window_label == label
            shifts.append(tuple(shift))
    counts = [shifts.count((top, left)) for top in range(3) for left in range(3)]
    assert min(counts) > 0.5 * len(shifts) / 9


def test_smaller_crops_come_from_inside_the_image(held_out):
    originals, _ = read_all(held_out.images("train"))
    windows = {
        originals[index, top : top + 5, left : left + 5].tobytes(): (top, left)
        for index in range(len(originals))
        for top in range(4)
        for left in range(4)
    }
    batches = list(held_out.training(256, range(1), image_size=5).as_numpy_iterator())
    assert {images.shape for images, _ in batches} == {(256, 5, 5, 1)}
    pixels = (np.concatenate([images for images, _ in batches]) * 128 + 128).astype(np.uint8)
    assert {windows[image.tobytes()] for image in pixels} == {(top, left) for top in range(4) for left in range(4)}


def share_mirrored(data):
    (images, _), *_ = data.training(64, range(1)).as_numpy_iterator()
    return np.mean(images[:, 3, 1, 0] < images[:, 3, 4, 0])


def test_images_are_mirrored_unless_that_changes_their_class(tmp_path):
    """Pictures are mirrored; digits are not (see above), and nothing is with flip=False."""
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)}
    folder = write_dataset(tmp_path, {"train": 64, "test": 2}, features, lambda _: BRIGHT_LEFT)
    for crop in ("pad", "random_resized"):
        pictures = ClassificationData("tiny", folder, hold_out=False, crop=crop, crop_padding=1)
        assert 0.25 < share_mirrored(pictures) < 0.75
        assert share_mirrored(ClassificationData("tiny", folder, hold_out=False, crop=crop, flip=False)) == 0


def test_random_resized_crops_depend_on_seed_and_epoch_alone(pictures):
    def read_batches(first_epoch, seed=0):
        data = ClassificationData(
            "tiny", pictures, Preprocessing((16, 16)), hold_out=False, crop="random_resized", seed=seed
        )
        batches = list(data.training(8, range(first_epoch, 2)).as_numpy_iterator())
        assert len(batches) == 3 * (2 - first_epoch)
        assert {images.shape for images, _ in batches} == {(8, 16, 16, 3)}
        return batches

    both = read_batches(0)
    assert_same_batches(both, read_batches(0))
    assert_same_batches(both[3:], read_batches(1))
    assert not np.array_equal(both[0][0], both[3][0])
    assert not np.array_equal(both[0][0], read_batches(0, seed=1)[0][0])


def test_random_resized_crops_are_windows_of_the_stored_images():
    """Pixels that hold their own coordinates show which window was cut: area, aspect ratio and place."""
    rows, columns = np.meshgrid(np.arange(120), np.arange(200), indexing="ij")
    image = np.stack([2 * rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    windows = []
    for encoded in (tf.io.encode_jpeg(image, quality=100, chroma_downsampling=False), tf.io.encode_png(image)):
        crop = tf.function(
            lambda seed, encoded=encoded: random_resized_crop(encoded, tf.io.decode_png, 3, (32, 32), False, seed)
        )
        crops = np.stack([crop(tf.constant([0, index])) for index in range(60)]).astype(float)
        # From the centre of the first pixel to that of the last is 31/32 of the window.
        heights = (crops[:, -1, :, 0].mean(axis=1) - crops[:, 0, :, 0].mean(axis=1)) / 2 * 32 / 31
        widths = (crops[:, :, -1, 1].mean(axis=1) - crops[:, :, 0, 1].mean(axis=1)) * 32 / 31
        windows.append(np.stack([heights, widths], axis=1))
    jpeg_windows, png_windows = windows
    np.testing.assert_allclose(jpeg_windows, png_windows, atol=2)  # the same windows, whatever the format
    area, ratio = png_windows[:, 0] * png_windows[:, 1] / (120 * 200), png_windows[:, 1] / png_windows[:, 0]
    assert 0.06 < area.min() < 0.2 and 0.5 < area.max() <= 1.02
    assert 0.7 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.4


def test_datasets_too_large_for_the_cache_are_decoded_as_they_are_read(pictures, monkeypatch):
    """The same images with and without a cache; without, every image is still seen once in an epoch."""
    size = Preprocessing((16, 16))
    seen, has_cache = [], []
    for cache_bytes in (24 * 16 * 16 * 3, 24 * 16 * 16 * 3 - 1):
        monkeypatch.setattr(image_split, "_CACHE_BYTES", cache_bytes)
        data = ClassificationData("tiny", pictures, size, hold_out=False, flip=False)
        batches = list(data.training(8, range(1)).as_numpy_iterator())
        seen.append(np.concatenate([images for images, _ in batches]))
        assert len(seen[-1]) == 24
        has_cache.append("_cached_images" in vars(data._images["train"]))
    assert sorted(hashable(seen[0])) == sorted(hashable(seen[1]))
    assert has_cache == [True, False]


def test_steps_of_an_epoch_can_be_fewer(held_out):
    batches = list(held_out.training(256, range(2), steps_per_epoch=2).as_numpy_iterator())
    whole = read_epochs(held_out, 2)
    assert_same_batches(batches, [*whole[:2], *whole[5:7]])
