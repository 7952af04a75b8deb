"""Splits that are what they say, and batches that depend on seed and epoch alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from tf_repvgg.data import NORMALIZATIONS, ClassificationData, Digits, Preprocessing, classification, preprocessing
from tf_repvgg.data.augmentation import random_resized_crop

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"


def everything(dataset):
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(images), np.array(labels)


def keys(images):
    return [image.tobytes() for image in images]


@pytest.fixture(scope="module")
def held_out():
    return ClassificationData("digits", hold_out=True, crop_padding=1)


def test_digits_are_those_of_scikit_learn(digits):
    train, train_labels = everything(digits.images("train"))
    test, test_labels = everything(digits.images("test"))
    assert train.shape == (1437, 8, 8, 1) and test.shape == (360, 8, 8, 1)
    assert train.dtype == np.uint8
    assert (digits.num_examples("train"), digits.num_examples("test")) == (1437, 360)
    assert (digits.image_shape, digits.num_classes, digits.name) == ((8, 8, 1), 10, "digits")
    source = load_digits()
    expected = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.concatenate([train, test])
    assert sorted(keys(order)) == sorted(keys(expected))
    label_of = dict(zip(keys(expected), source.target, strict=True))
    assert [label_of[key] for key in keys(order)] == [*train_labels, *test_labels]
    assert set(test_labels) == set(range(10))


def test_splits_are_disjoint_and_whole(digits, held_out):
    assert len(load_digits().images) == len(set(keys(load_digits().images)))  # so pixels identify an image
    train, _ = everything(held_out.images("train"))
    validation, _ = everything(held_out.images("validation"))
    test, _ = everything(held_out.images("test"))
    assert len(train) == held_out.num_examples("train")
    assert len(validation) == held_out.num_examples("validation")
    assert len(train) + len(validation) == 1437
    assert len(validation) == pytest.approx(143.7, abs=1)
    parts = [set(keys(part)) for part in (train, validation, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797
    everything_but_test, _ = everything(digits.images("train"))
    assert set(keys(everything_but_test)) == parts[0] | parts[1]


def test_digits_are_the_same_wherever_they_are_written(digits, tmp_path):
    again = ClassificationData("digits", data_dir=str(tmp_path), hold_out=False)
    for split in ("train", "test"):
        for mine, its in zip(everything(digits.images(split)), everything(again.images(split)), strict=True):
            np.testing.assert_array_equal(mine, its)
    builder = Digits(data_dir=str(tmp_path))
    assert builder.is_prepared()
    assert isinstance(builder, tfds.core.DatasetBuilder)
    assert builder.info.splits["train"].num_examples == 1437


def test_preprocessing_maps_pixels_to_int8():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    normalised = Preprocessing((16, 16))(pixels).numpy()
    assert normalised.dtype == np.float32
    assert (normalised.min(), normalised.max()) == (-1, 127 / 128)
    # Scale 1/128 and zero point 0: the int8 code of pixel p is p - 128, exactly.
    np.testing.assert_array_equal(normalised * 128, pixels.astype(np.int64) - 128)
    np.testing.assert_allclose(Preprocessing((16, 16), mean=100.0, std=50.0)(pixels), (pixels - 100.0) / 50, rtol=1e-6)


def test_evaluation_shows_every_image_once_in_order(held_out):
    batches = list(held_out.evaluation("validation", 64).as_numpy_iterator())
    assert [len(images) for images, _ in batches] == [64, 64, held_out.num_examples("validation") - 128]
    images, labels = everything(held_out.images("validation"))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels)
    np.testing.assert_allclose(np.concatenate([x for x, _ in batches]) * 128 + 128, images)


def epochs_of(data, epochs, first_epoch=0, batch_size=256):
    batches = list(data.training(batch_size, range(first_epoch, epochs)).as_numpy_iterator())
    assert len(batches) == data.steps_per_epoch(batch_size) * (epochs - first_epoch)
    return batches


def assert_same_batches(mine, its):
    for (images, labels), (other_images, other_labels) in zip(mine, its, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_training_batches_depend_on_seed_and_epoch_alone(held_out):
    steps = held_out.steps_per_epoch(256)
    assert steps == held_out.num_examples("train") // 256 == 5
    three = epochs_of(held_out, 3)
    again = ClassificationData("digits", hold_out=True, crop_padding=1)
    assert_same_batches(three, epochs_of(again, 3))
    # Continuing at an epoch gives what an uninterrupted run would have seen.
    assert_same_batches(three[steps:], epochs_of(again, 3, first_epoch=1))
    assert_same_batches(three[2 * steps :], epochs_of(again, 3, first_epoch=2))
    # Also within an epoch, and when an iterator has been dropped before.
    dataset = again.training(256, range(1, 3), first_step=2)
    next(iter(dataset))
    assert_same_batches(three[steps + 2 :], list(dataset.as_numpy_iterator()))
    # Epochs differ, and so do seeds.
    assert not np.array_equal(three[0][1], three[steps][1])
    other = epochs_of(ClassificationData("digits", hold_out=True, crop_padding=1, seed=1), 1)
    assert not np.array_equal(three[0][1], other[0][1])


def test_an_epoch_shows_every_image_at_most_once(held_out):
    _, train_labels = everything(held_out.images("train"))
    labels = np.concatenate([labels for _, labels in epochs_of(held_out, 1)])
    assert np.all(np.bincount(labels, minlength=10) <= np.bincount(train_labels, minlength=10))
    assert len(labels) == 5 * 256


def test_augmentation_crops_from_a_padded_image(held_out):
    """Digits are padded by one pixel, shifted by -1, 0 or 1, and never mirrored."""
    originals, labels = everything(held_out.images("train"))
    padded = np.pad(originals, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = {
        padded[:, top : top + 8, left : left + 8].tobytes()[index * 64 : index * 64 + 64]: (labels[index], top, left)
        for top in range(3)
        for left in range(3)
        for index in range(len(originals))
    }
    shifts = []
    for images, batch_labels in epochs_of(held_out, 1):
        pixels = (images * 128 + 128).astype(np.uint8)
        for image, label in zip(pixels, batch_labels, strict=True):
            found = windows[image.tobytes()]  # KeyError: not a crop of any training image
            assert found[0] == label
            shifts.append(found[1:])
    counts = [shifts.count((top, left)) for top in range(3) for left in range(3)]
    assert min(counts) > 0.5 * len(shifts) / 9


def test_smaller_crops_come_from_inside_the_image(held_out):
    originals, _ = everything(held_out.images("train"))
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


def test_calibration_images_are_the_first_of_the_split(held_out):
    for split in ("train", "validation"):
        found = np.stack(list(held_out.calibration(20, split).as_numpy_iterator()))
        images, _ = everything(held_out.images(split).take(20))
        np.testing.assert_allclose(found * 128 + 128, images)
    with pytest.raises(ValueError, match="361 calibration images asked for, but 'test' has 360"):
        held_out.calibration(361, "test")


def test_resizing():
    data = ClassificationData("digits", preprocessing=Preprocessing((17, 20)))
    assert data.image_shape == (17, 20, 1)
    assert data.preprocessing.size == (17, 20)
    images, _ = everything(data.images("test").take(4))
    assert images.shape == (4, 17, 20, 1) and images.dtype == np.uint8
    originals, _ = everything(ClassificationData("digits").images("test").take(4))
    expected = tf.image.resize(originals, (17, 20), antialias=True)
    np.testing.assert_allclose(images, expected, atol=0.51)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="dataset 'digitz' is not in TFDS; known here: digits, cifar10, folder:PATH"):
        ClassificationData("digitz")
    with pytest.raises(FileNotFoundError, match=r"does not hold the dataset 'cifar10' \(looked for .*cifar10"):
        ClassificationData("cifar10", data_dir=str(tmp_path))
    assert not list(tmp_path.rglob("*cifar10*"))
    with pytest.raises(ValueError, match="batch size 5000 is larger than the 1437 training images of 'digits'"):
        ClassificationData("digits", hold_out=False).steps_per_epoch(5000)


def write_set(folder, splits, features, make_image=lambda index: np.full((6, 6, 3), index, np.uint8)):
    """Writes an unregistered TFDS set called 'tiny' and returns its folder."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(count) for name, count in splits.items()}

        def _generate_examples(self, count):
            for index in range(count):
                example = {name: index % 3 for name in features if name != "image"}
                yield index, {"image": make_image(index), **example}

    Tiny(data_dir=str(folder)).download_and_prepare()
    return str(folder)


IMAGE = tfds.features.Image(shape=(6, 6, 3))


BRIGHT_LEFT = np.repeat(np.uint8([200, 200, 200, 0, 0, 0]), 3).reshape(1, 6, 3).repeat(6, axis=0)


def share_mirrored(data):
    (images, _), *_ = data.training(64, range(1)).as_numpy_iterator()
    return np.mean(images[:, 3, 1, 0] < images[:, 3, 4, 0])


def test_flip_unless_a_mirrored_class_is_another(tmp_path):
    """Pictures are; digits are not (their augmentation is tested above), nor is anything with flip=False."""
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)}
    folder = write_set(tmp_path, {"train": 64, "test": 2}, features, lambda _: BRIGHT_LEFT)
    for crop in ("pad", "random_resized"):
        pictures = ClassificationData("tiny", folder, hold_out=False, crop=crop, crop_padding=1)
        assert 0.25 < share_mirrored(pictures) < 0.75
        assert share_mirrored(ClassificationData("tiny", folder, hold_out=False, crop=crop, flip=False)) == 0


def test_other_sets_with_splits_of_their_own(tmp_path):
    """With test and validation in the set nothing is cut; without hold-out, validation data train too."""
    label = tfds.features.ClassLabel(num_classes=3)
    folder = write_set(tmp_path, {"train": 40, "validation": 10, "test": 20}, {"image": IMAGE, "label": label})
    data = ClassificationData("tiny", folder)
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [40, 10, 20]
    assert ClassificationData("tiny", folder, hold_out=False).num_examples("train") == 50
    assert data.num_classes == 3


def test_other_sets_without_a_test_split(tmp_path):
    """As ImageNet: "validation" is what one tests on, and validation data are cut from training data."""
    label = tfds.features.ClassLabel(num_classes=3)
    folder = write_set(tmp_path, {"train": 40, "validation": 10}, {"image": IMAGE, "label": label})
    data = ClassificationData("tiny", folder)
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [36, 4, 10]


def test_sets_that_cannot_be_used(tmp_path):
    no_label = {"image": IMAGE, "mask": tfds.features.Scalar(np.int64)}
    folder = write_set(tmp_path / "a", {"train": 4, "test": 2}, no_label)
    with pytest.raises(ValueError, match=r"dataset 'tiny' has no image and label, but (image, mask|mask, image)"):
        ClassificationData("tiny", folder)
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    folder = write_set(tmp_path / "b", {"train": 4, "test": 2}, features)
    with pytest.raises(ValueError, match="images of dataset 'tiny' differ in size"):
        ClassificationData("tiny", folder)
    assert ClassificationData("tiny", folder, Preprocessing((8, 8)), hold_out=False).image_shape == (8, 8, 3)
    with pytest.raises(ValueError, match="too few images to hold a tenth of them out; use --novalidation"):
        ClassificationData("tiny", folder, Preprocessing((8, 8)))
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)}
    folder = write_set(tmp_path / "c", {"train": 4}, features)
    with pytest.raises(ValueError, match="no test or validation split, but train"):
        ClassificationData("tiny", folder)
    features = {"image": IMAGE, "label": tfds.features.Scalar(np.int64)}
    folder = write_set(tmp_path / "d", {"train": 10, "test": 2}, features)
    with pytest.raises(ValueError, match="label of dataset 'tiny' is no class"):
        ClassificationData("tiny", folder)


@pytest.mark.parametrize(
    "feature, error, message",
    [
        ("text", ValueError, "dataset 'far_away' has no image and label, but text"),
        ("image", FileNotFoundError, "TFDS cannot download and prepare the dataset 'far_away' by itself: checksum"),
    ],
)
def test_sets_that_are_not_on_this_machine(tmp_path, monkeypatch, feature, error, message):
    """Refused by its features before it is downloaded, or with whatever ends the download."""
    features = {
        "text": {"text": tfds.features.Text()},
        "image": {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)},
    }[feature]

    class FarAway(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "far_away"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            raise RuntimeError("checksum")

        def _generate_examples(self):
            yield from ()

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: FarAway(data_dir=str(tmp_path)))
    with pytest.raises(error, match=message):
        ClassificationData("far_away")


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"CIFAR-10 in TFDS form is not at {SHARED}")
def test_cifar10():
    data = ClassificationData("cifar10", data_dir=str(SHARED))
    assert data.image_shape == (32, 32, 3)
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
    assert ClassificationData("cifar10", str(SHARED), hold_out=False).num_examples("train") == 50_000
    images, labels = next(iter(data.evaluation("test", 100)))
    assert images.shape == (100, 32, 32, 3)
    assert set(labels.numpy()) <= set(range(10)) and len(set(labels.numpy())) == 10
    assert -1 <= images.numpy().min() < -0.5 and 0.5 < images.numpy().max() <= 127 / 128


def picture(index):
    """Noise of a height and width of its own, smooth enough that JPEG keeps it."""
    generator = np.random.default_rng(index)
    coarse = generator.integers(0, 256, (4, 5, 3)).astype(np.float32)
    image = tf.image.resize(coarse, (40 + 3 * index % 17, 30 + 7 * index % 23))
    return tf.cast(image, tf.uint8).numpy()


@pytest.fixture(scope="module", params=["jpeg", "png"])
def pictures(request, tmp_path_factory):
    """Folder of a TFDS set whose images differ in size."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format=request.param),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    folder = tmp_path_factory.mktemp(request.param)
    return write_set(folder, {"train": 24, "test": 3}, features, picture)


def test_resizing_the_shorter_side_and_cutting_out_the_centre(pictures):
    """Against Pillow's resize and crop, as torchvision's Resize and CenterCrop do it."""
    data = ClassificationData("tiny", pictures, Preprocessing((20, 18), resize_shorter_side=24))
    (stored, _), (found, _) = (
        everything_of_any_size(dataset)
        for dataset in (
            data._source.encoded("test").map(lambda image, label: (data._source.decode(image), label)),
            data.images("test"),
        )
    )
    for image, result in zip(stored, found, strict=True):
        height, width, _ = image.shape
        size = (24 * width // min(height, width), 24 * height // min(height, width))
        large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        top, left = round((large.shape[0] - 20) / 2), round((large.shape[1] - 18) / 2)
        assert result.shape == (20, 18, 3)
        np.testing.assert_allclose(result, large[top : top + 20, left : left + 18].astype(int), atol=2)


@pytest.mark.parametrize("shape", [(4, 5001, 3), (5000, 4, 3)])
def test_long_images_are_not_resized_as_a_whole(shape, monkeypatch):
    """Their shorter side would be, which made the longer 30,000 pixels; the centre is the same."""
    image = np.zeros(shape, np.uint8)
    middle = tuple(slice(length // 2 - 2, length // 2 + 2) for length in shape[:2])
    image[middle] = 255
    sizes = []
    resize = preprocessing.resized
    monkeypatch.setattr(preprocessing, "resized", lambda x, size: sizes.append(np.max(size)) or resize(x, size))
    found = Preprocessing((20, 20), resize_shorter_side=24).resize(tf.constant(image)).numpy()
    assert found.shape == (20, 20, 3) and max(sizes) <= 8 * 24 + 6
    assert np.mean(found) > 200


def everything_of_any_size(dataset):
    return zip(*dataset.as_numpy_iterator(), strict=True)


def test_normalization_per_channel(pictures):
    mean, std = NORMALIZATIONS["imagenet"]
    data = ClassificationData("tiny", pictures, Preprocessing((20, 18), mean, std))
    images, _ = everything(data.images("test"))
    ((normalised, _),) = data.evaluation("test", 3).as_numpy_iterator()
    published = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalised, published, atol=1e-5)
    np.testing.assert_allclose(next(iter(data.calibration(1, "test"))), published[0], atol=1e-5)
    assert Preprocessing.from_facts(json.loads(json.dumps(data.facts()))) == data.preprocessing
    assert data.facts()["labels"] == ["a", "b", "c"]
    # Runs of before know of no resize_shorter_side.
    old = {"dataset": "tiny", "size": [8, 8], "mean": 128.0, "std": 128.0}
    assert Preprocessing.from_facts(old) == Preprocessing((8, 8))


def test_random_resized_crops_depend_on_seed_and_epoch_alone(pictures):
    def batches(first_epoch, seed=0):
        data = ClassificationData(
            "tiny", pictures, Preprocessing((16, 16)), hold_out=False, crop="random_resized", seed=seed
        )
        found = list(data.training(8, range(first_epoch, 2)).as_numpy_iterator())
        assert len(found) == 3 * (2 - first_epoch)
        assert {images.shape for images, _ in found} == {(8, 16, 16, 3)}
        return found

    both = batches(0)
    assert_same_batches(both, batches(0))
    assert_same_batches(both[3:], batches(1))
    assert not np.array_equal(both[0][0], both[3][0])
    assert not np.array_equal(both[0][0], batches(0, seed=1)[0][0])


def test_random_resized_crops_are_windows_of_the_stored_images():
    """Pixels that hold their own coordinates tell which window was cut: its area, its aspect ratio, its place."""
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
    of_jpeg, of_png = windows
    np.testing.assert_allclose(of_jpeg, of_png, atol=2)  # the same windows, whatever the format
    area, ratio = of_png[:, 0] * of_png[:, 1] / (120 * 200), of_png[:, 1] / of_png[:, 0]
    assert 0.06 < area.min() < 0.2 and 0.5 < area.max() <= 1.02
    assert 0.7 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.4


def test_sets_too_large_for_the_cache_are_decoded_as_they_are_read(pictures, monkeypatch):
    """The same images with and without a cache; without, every image is still seen once in an epoch."""
    size = Preprocessing((16, 16))
    seen, has_cache = [], []
    for cache_bytes in (24 * 16 * 16 * 3, 24 * 16 * 16 * 3 - 1):
        monkeypatch.setattr(classification, "_CACHE_BYTES", cache_bytes)
        data = ClassificationData("tiny", pictures, size, hold_out=False, flip=False)
        batches = list(data.training(8, range(1)).as_numpy_iterator())
        seen.append(np.concatenate([images for images, _ in batches]))
        assert len(seen[-1]) == 24
        has_cache.append("_cached_training_images" in vars(data))
    assert sorted(keys(seen[0])) == sorted(keys(seen[1]))
    assert has_cache == [True, False]


def test_steps_of_an_epoch_can_be_fewer(held_out):
    batches = list(held_out.training(256, range(2), steps_per_epoch=2).as_numpy_iterator())
    whole = epochs_of(held_out, 2)
    assert_same_batches(batches, [*whole[:2], *whole[5:7]])


def test_preprocessing_that_cannot_be(pictures):
    with pytest.raises(ValueError, match=r"size \(20, 18\) does not fit .* shorter side is resized to 19"):
        Preprocessing((20, 18), resize_shorter_side=19)
    with pytest.raises(ValueError, match="needs a size"):
        Preprocessing(resize_shorter_side=19)
    with pytest.raises(ValueError, match="not of the same channels"):
        Preprocessing(mean=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="std is 0"):
        Preprocessing(std=0)
    with pytest.raises(ValueError, match="for images of 3 channels, but these have 1"):
        ClassificationData("digits", preprocessing=Preprocessing(None, *NORMALIZATIONS["imagenet"]))
    with pytest.raises(ValueError, match="crop is 'centre'; known: pad, random_resized"):
        ClassificationData("tiny", pictures, Preprocessing((8, 8)), crop="centre")
