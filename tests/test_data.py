"""Datasets: splits that are what they say, and refusals that say what is wrong."""

import os
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.datasets import IMAGE, hashable, read_all, write_dataset
from sklearn.datasets import load_digits

from tf_repvgg.data import ClassificationData, Digits, Preprocessing

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
LABELLED_IMAGE = {"image": IMAGE, "label": tfds.features.ClassLabel(num_classes=3)}


@pytest.fixture(scope="module")
def held_out():
    return ClassificationData("digits", hold_out=True, crop_padding=1)


def test_digits_are_those_of_scikit_learn(digits):
    train, train_labels = read_all(digits.images("train"))
    test, test_labels = read_all(digits.images("test"))
    assert train.shape == (1437, 8, 8, 1) and test.shape == (360, 8, 8, 1)
    assert train.dtype == np.uint8
    assert (digits.num_examples("train"), digits.num_examples("test")) == (1437, 360)
    assert (digits.image_shape, digits.num_classes, digits.name) == ((8, 8, 1), 10, "digits")
    source = load_digits()
    expected = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.concatenate([train, test])
    assert sorted(hashable(order)) == sorted(hashable(expected))
    label_of = dict(zip(hashable(expected), source.target, strict=True))
    assert [label_of[key] for key in hashable(order)] == [*train_labels, *test_labels]
    assert set(test_labels) == set(range(10))


def test_splits_are_disjoint_and_whole(digits, held_out):
    assert len(load_digits().images) == len(set(hashable(load_digits().images)))  # so the pixels identify an image
    train, _ = read_all(held_out.images("train"))
    validation, _ = read_all(held_out.images("validation"))
    test, _ = read_all(held_out.images("test"))
    assert len(train) == held_out.num_examples("train")
    assert len(validation) == held_out.num_examples("validation")
    assert len(train) + len(validation) == 1437
    assert len(validation) == pytest.approx(143.7, abs=1)
    parts = [set(hashable(part)) for part in (train, validation, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797
    everything_but_test, _ = read_all(digits.images("train"))
    assert set(hashable(everything_but_test)) == parts[0] | parts[1]


def test_digits_are_the_same_wherever_they_are_written(digits, tmp_path):
    again = ClassificationData("digits", data_dir=str(tmp_path), hold_out=False)
    for split in ("train", "test"):
        for expected, actual in zip(read_all(digits.images(split)), read_all(again.images(split)), strict=True):
            np.testing.assert_array_equal(actual, expected)
    builder = Digits(data_dir=str(tmp_path))
    assert builder.is_prepared()
    assert isinstance(builder, tfds.core.DatasetBuilder)
    assert builder.info.splits["train"].num_examples == 1437


def test_evaluation_shows_every_image_once_in_order(held_out):
    batches = list(held_out.evaluation("validation", 64).as_numpy_iterator())
    assert [len(images) for images, _ in batches] == [64, 64, held_out.num_examples("validation") - 128]
    stored, labels = read_all(held_out.images("validation"))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels)
    np.testing.assert_allclose(np.concatenate([images for images, _ in batches]) * 128 + 128, stored)


def test_calibration_images_are_the_first_of_the_split(held_out):
    for split in ("train", "validation"):
        calibration = np.stack(list(held_out.calibration(20, split).as_numpy_iterator()))
        images, _ = read_all(held_out.images(split).take(20))
        np.testing.assert_allclose(calibration * 128 + 128, images)
    with pytest.raises(ValueError, match="361 calibration images were requested, but 'test' has 360"):
        held_out.calibration(361, "test")


def test_datasets_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match="dataset 'digitz' is not in TFDS; known: digits, cifar10, folder:PATH"):
        ClassificationData("digitz")
    with pytest.raises(FileNotFoundError, match=r"does not contain the dataset 'cifar10' \(looked for .*cifar10"):
        ClassificationData("cifar10", data_dir=str(tmp_path))
    assert not list(tmp_path.rglob("*cifar10*"))
    with pytest.raises(ValueError, match="batch size 5000 is larger than the 1437 training images of 'digits'"):
        ClassificationData("digits", hold_out=False).steps_per_epoch(5000)


DAMAGED = {
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "tfrecord-00000-of-00001' is a named pipe"),
    "missing": (lambda path: path.unlink(), "tfrecord-00000-of-00001' of the dataset 'digits' is missing"),
    "description": (
        lambda path: path.with_name("dataset_info.json").write_text("{"),
        r"TFDS cannot open the dataset 'digits' \(ParseError",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_datasets_are_named_before_anything_is_read(case, digits, tmp_path):
    damage, message = DAMAGED[case]
    shutil.copytree(Digits().data_path, tmp_path / "digits" / "1.0.0")
    damage(next(tmp_path.rglob("*train.tfrecord*")))
    with pytest.raises((OSError, ValueError), match=message):
        ClassificationData("digits", data_dir=str(tmp_path))


def test_dataset_with_three_splits(tmp_path):
    """Nothing is cut from a dataset with test and validation; without hold-out, validation data train too."""
    label = tfds.features.ClassLabel(num_classes=3)
    folder = write_dataset(tmp_path, {"train": 40, "validation": 10, "test": 20}, {"image": IMAGE, "label": label})
    data = ClassificationData("tiny", folder)
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [40, 10, 20]
    assert ClassificationData("tiny", folder, hold_out=False).num_examples("train") == 50
    assert data.num_classes == 3


def test_dataset_without_a_test_split(tmp_path):
    """As in ImageNet: "validation" becomes the test split, and validation data are cut from training data."""
    label = tfds.features.ClassLabel(num_classes=3)
    folder = write_dataset(tmp_path, {"train": 40, "validation": 10}, {"image": IMAGE, "label": label})
    data = ClassificationData("tiny", folder)
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [36, 4, 10]


def test_datasets_that_cannot_be_used(tmp_path):
    no_label = {"image": IMAGE, "mask": tfds.features.Scalar(np.int64)}
    folder = write_dataset(tmp_path / "a", {"train": 4, "test": 2}, no_label)
    with pytest.raises(
        ValueError, match=r"dataset 'tiny' has the features (image, mask|mask, image); it needs an image and a label"
    ):
        ClassificationData("tiny", folder)
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    folder = write_dataset(tmp_path / "b", {"train": 4, "test": 2}, features)
    with pytest.raises(ValueError, match="images of dataset 'tiny' differ in size"):
        ClassificationData("tiny", folder)
    assert ClassificationData("tiny", folder, Preprocessing((8, 8)), hold_out=False).image_shape == (8, 8, 3)
    with pytest.raises(ValueError, match="too few images to hold a tenth of them out; use --novalidation"):
        ClassificationData("tiny", folder, Preprocessing((8, 8)))
    folder = write_dataset(tmp_path / "c", {"train": 4}, LABELLED_IMAGE)
    with pytest.raises(ValueError, match="dataset 'tiny' has no test or validation split, but train"):
        ClassificationData("tiny", folder)
    features = {"image": IMAGE, "label": tfds.features.Scalar(np.int64)}
    folder = write_dataset(tmp_path / "d", {"train": 10, "test": 2}, features)
    with pytest.raises(ValueError, match=r"label of dataset 'tiny' is .*; it must be a tfds\.features\.ClassLabel"):
        ClassificationData("tiny", folder)


def pretend_to_know(monkeypatch, folder, features, files=None):
    """Lets TFDS know a dataset 'far_away', whose preparation fails; files: {URL: size}."""

    class FarAway(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "far_away"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {url: SimpleNamespace(size=size) for url, size in (files or {}).items()}  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            raise RuntimeError("checksum")

        def _generate_examples(self):
            yield from ()

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: FarAway(data_dir=str(folder)))


@pytest.mark.parametrize(
    "features, error, message",
    [
        (
            {"text": tfds.features.Text()},
            ValueError,
            "dataset 'far_away' has the features text; it needs an image and a label",
        ),
        (LABELLED_IMAGE, FileNotFoundError, "TFDS cannot download and prepare the dataset 'far_away' by itself: check"),
    ],
)
def test_datasets_that_are_not_on_this_machine(tmp_path, monkeypatch, features, error, message):
    """Refused because of its features before the download, or because the download fails."""
    pretend_to_know(monkeypatch, tmp_path, features)
    with pytest.raises(error, match=message):
        ClassificationData("far_away")


def test_download_without_a_network_is_not_waited_for(tmp_path, monkeypatch):
    """Only files that are not there yet need a server, and any answer shows that there is one."""
    unreachable = "http://127.0.0.1:1/images.tgz"
    pretend_to_know(monkeypatch, tmp_path, LABELLED_IMAGE, {unreachable: 5})
    with pytest.raises(FileNotFoundError, match=r"by itself: no connection to http://127\.0\.0\.1:1/images\.tgz$"):
        ClassificationData("far_away")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reachable = f"http://127.0.0.1:{server.getsockname()[1]}/images.tgz"
        pretend_to_know(monkeypatch, tmp_path, LABELLED_IMAGE, {unreachable: 5, reachable: 5})
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.0 404 Gone\r\n\r\n"))
        thread.start()
        with pytest.raises(FileNotFoundError, match="by itself: checksum"):
            ClassificationData("far_away")
        thread.join()
    (tmp_path / "downloads").mkdir(exist_ok=True)
    (tmp_path / "downloads" / "images.tgz").write_bytes(b"12345")
    pretend_to_know(monkeypatch, tmp_path, LABELLED_IMAGE, {unreachable: 5})
    with pytest.raises(FileNotFoundError, match="by itself: checksum"):
        ClassificationData("far_away")


def test_memory_of_evaluation_is_bounded(digits, tmp_path):
    """A network needs many times the memory of its input, so batches of large images are small."""
    assert digits.evaluation_batch_size == 500
    folder = write_dataset(tmp_path, {"train": 10, "test": 2}, LABELLED_IMAGE)
    data = ClassificationData("tiny", folder, Preprocessing((160, 160)))
    assert data.evaluation_batch_size == 27
    assert ClassificationData("tiny", folder, Preprocessing((2000, 2000))).evaluation_batch_size == 1


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
