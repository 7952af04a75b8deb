"""Datasets of TFDS as sources of images. A folder of the user's own images has the same interface."""

import contextlib
import io
import re
import sys
import urllib.parse
from pathlib import Path

import requests
import tensorflow as tf
import tensorflow_datasets as tfds

from tf_repvgg import regular_files, storage
from tf_repvgg.data.digits import Digits

_SHUFFLE_IMAGES = 50_000
_SHUFFLE_BYTES = 1024**3
# A mirrored digit or letter has another shape.
_NO_FLIP = frozenset({"digits", "mnist", "mnist_corrupted", "svhn_cropped", "emnist", "kmnist"})
# Their "test" has no labels: every label is -1.
_UNLABELLED_TEST = frozenset({"imagenet2012"})
_NAME = re.compile(r"[a-z]\w*(/[^/:=,\s]+)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)
_SERVERS_TO_TRY = 2
_SECONDS_TO_ANSWER = 5


class TfdsSource:
    """The encoded images and labels of a TFDS dataset, which is downloaded if need be.

    Args:
      name: Name of the dataset.
      data_dir: TFDS data directory; None for TFDS's own.

    Attributes:
      name: Name of the dataset.
      labels: Names of the classes, in the order of their numbers.
      image_shape: Height, width and channels; None for a height and width that differ between images.
      flips: Whether a mirrored image belongs to the same class.
      splits: Names of the splits that have labels.

    Raises:
      ValueError: If the dataset is unknown, or is not for image classification.
      FileNotFoundError: If `data_dir` is given and does not contain the dataset, or TFDS cannot download it.
    """

    def __init__(self, name: str, data_dir: str | None = None) -> None:
        self.name = name
        self._builder = _make_builder(name, data_dir)
        _check_features(self._builder.info.features, name)  # before a download that may take hours
        if not self._builder.is_prepared():
            self._builder = _prepare(self._builder, name, data_dir)
        info = self._builder.info
        _check_shards(info, name)
        self.labels = tuple(info.features["label"].names)
        self.image_shape = info.features["image"].shape
        self.flips = self._builder.name not in _NO_FLIP
        unlabelled = {"test"} if self._builder.name in _UNLABELLED_TEST else set()
        self.splits = [split for split in info.splits if split not in unlabelled]

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits as TFDS writes them: "train[:90%]"."""
        return self._builder.info.splits[split].num_examples

    def list_examples(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """References to images, here their files (bytes), and int64 labels, in the stored order or shuffled.

        They are shuffled as well as memory allows.

        The shuffle buffer holds encoded images, at most 1 GiB. Larger datasets are stored in many files, whose order
        is drawn too.
        """
        shuffles = shuffle_seed is not None
        dataset = self._builder.as_dataset(
            split,
            shuffle_files=shuffles,
            decoders=tfds.decode.PartialDecoding({"image", "label"}, {"image": tfds.decode.SkipDecoding()}),
            read_config=tfds.ReadConfig(shuffle_seed=shuffle_seed, try_autocache=False),
        )
        dataset = dataset.map(lambda example: (example["image"], example["label"]))
        if not shuffles:
            return dataset
        info = self._builder.info.splits[split]
        bytes_per_image = max(info.num_bytes // max(info.num_examples, 1), 1)
        count = min(info.num_examples, _SHUFFLE_IMAGES, _SHUFFLE_BYTES // bytes_per_image)
        return dataset.shuffle(count, shuffle_seed, reshuffle_each_iteration=False)

    def read(self, reference: tf.Tensor) -> tf.Tensor:
        """An image file (bytes), which `list_examples` has read already."""
        return reference

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes an image file to uint8 [height, width, channels]."""
        return self._builder.info.features["image"].decode_example(encoded)


def _make_builder(name, data_dir):
    if not _NAME.fullmatch(name):  # TFDS would read arguments of its builders from it, or look for it on the network
        raise ValueError(
            f"{name!r} cannot be the name of a TFDS dataset; write NAME, NAME/CONFIG, NAME:1.2.3 or NAME/CONFIG:1.2.3"
        )
    if data_dir is not None and "://" not in data_dir:
        _check_files(Path(data_dir, re.split("[/:]", name)[0]))
    try:
        return Digits(data_dir=data_dir) if name == Digits.name else tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, AssertionError):  # the latter for unknown versions
        raise ValueError(
            f"dataset {name!r} is not in TFDS; known: digits, cifar10, folder:PATH, and every TFDS name"
        ) from None
    except Exception as error:  # of many kinds, about damaged descriptions
        raise ValueError(
            f"TFDS cannot open the dataset {name!r} ({type(error).__name__}: {error}); if its folder is damaged, "
            "remove it and prepare it again"
        ) from None


def _check_files(folder):
    """Checks that a prepared dataset has regular files alone: TFDS would wait for a pipe for ever.

    Raises:
      OSError: If it has others; names one.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            regular_files.open_to_read(path, sys.maxsize).close()


def _check_shards(info, name):
    for split in info.splits.values():
        for path in split.filepaths:
            if not path.exists():
                raise FileNotFoundError(
                    f"{str(path)!r} of the dataset {name!r} is missing; remove the folder and prepare it again"
                )


def _check_features(features, name):
    if not {"image", "label"} <= set(features or {}):
        raise ValueError(
            f"dataset {name!r} has the features {', '.join(features or ['(none)'])}; it needs an image and a label"
        )
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise ValueError(f"the label of dataset {name!r} is {features['label']}; it must be a tfds.features.ClassLabel")


def _lock_preparation(builder):
    """A context that one process at a time is in, unless the data are on another machine."""
    folder = str(builder.data_path)
    if "://" in folder:
        return contextlib.nullcontext()
    return storage.wait_for_lock(Path(folder).parents[1] / f".{builder.name}.lock")


def _prepare(builder, name, data_dir):
    """Downloads a missing dataset, unless the user has said where it should be; generates digits in either case.

    Returns:
      Builder of the dataset; another process may have prepared it in the meantime.
    """
    if data_dir is not None and name != Digits.name:
        raise FileNotFoundError(
            f"data_dir {data_dir!r} does not contain the dataset {name!r} (looked for {builder.data_path}); "
            "give a TFDS directory that does, or leave data_dir out to download the dataset"
        )
    # TFDS announces a download on stdout, also for digits, which need none.
    announcement = contextlib.redirect_stdout(io.StringIO()) if name == Digits.name else contextlib.nullcontext()
    try:
        # TFDS draws the names of temporary folders from Python's random numbers, which all our programs seed alike.
        with _lock_preparation(builder), announcement:
            builder = _make_builder(name, data_dir)
            if not builder.is_prepared():
                _check_network(builder)
                builder.download_and_prepare()
        return builder
    except Exception as error:  # of many kinds: a dataset to be fetched by hand, such as ImageNet; no network
        raise FileNotFoundError(f"TFDS cannot download and prepare the dataset {name!r} by itself: {error}") from None


def _check_network(builder):
    """Checks that a server answers, whatever it answers. Without a network, TFDS would try for minutes.

    Raises:
      ConnectionError: If files of the dataset must be downloaded, and its servers are out of reach.
    """
    files = {url: file for url, file in (builder.url_infos or {}).items() if url.startswith("http")}
    if not files or builder.MANUAL_DOWNLOAD_INSTRUCTIONS or _has_downloads(builder, files.values()):
        return
    urls = list({urllib.parse.urlsplit(url).netloc: url for url in files}.values())[:_SERVERS_TO_TRY]
    for url in urls:
        with contextlib.suppress(requests.RequestException):
            requests.head(url, timeout=_SECONDS_TO_ANSWER)
            return
    raise ConnectionError(f"no connection to {' or '.join(urls)}")


def _has_downloads(builder, files):
    """Whether one of the files may have been downloaded earlier; TFDS uses it without a network."""
    root = Path(builder.data_path).parents[builder.info.full_name.count("/")]
    sizes = {file.size for file in files}
    return any(path.is_file() and path.stat().st_size in sizes for path in (root / "downloads").glob("*"))
