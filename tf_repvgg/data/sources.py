"""Where images come from: TFDS sets. A folder of one's own images, with the same interface, is in image_folder.py."""

import tensorflow as tf
import tensorflow_datasets as tfds

from tf_repvgg.data.digits import Digits

_SHUFFLE_IMAGES = 50_000
_SHUFFLE_BYTES = 1024**3
# Mirrored digits are other shapes, not other pictures of the same digit.
_NO_FLIP = frozenset({"digits", "mnist", "mnist_corrupted", "svhn_cropped", "emnist", "kmnist"})
# Their "test" comes without labels: every label is -1.
_UNLABELLED_TEST = frozenset({"imagenet2012"})


class TfdsSource:
    """The encoded images and labels of a TFDS set.

    Attributes:
      name: the set's name.
      labels: names of the classes, in the order of their numbers.
      image_shape: (height, width, channels); None for a height and width that differ between images.
      flips: whether a mirrored image is one of the same class.
      splits: names of the splits that have labels.

    Raises:
      ValueError: for an unknown set, or one that is no classification of images.
      FileNotFoundError: if `data_dir` is given and does not hold the set, or TFDS cannot download it by itself.
    """

    def __init__(self, name, data_dir=None):
        self.name = name
        self._builder = _builder(name, data_dir)
        _check_features(self._builder.info.features, name)  # before what may be a download of hours
        _prepare(self._builder, name, data_dir)
        info = self._builder.info
        self.labels = tuple(info.features["label"].names)
        self.image_shape = info.features["image"].shape
        self.flips = self._builder.name not in _NO_FLIP
        unlabelled = {"test"} if self._builder.name in _UNLABELLED_TEST else set()
        self.splits = [split for split in info.splits if split not in unlabelled]

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits as TFDS writes them: "train[:90%]"."""
        return self._builder.info.splits[split].num_examples

    def encoded(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """(bytes of an image file, int64 label), in the stored order or shuffled as well as memory allows.

        The shuffle buffer holds encoded images, 1 GiB at most; sets larger than that are stored in many files, whose
        order is drawn too.
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

    def decode(self, encoded):
        """An image file's bytes to uint8 [height, width, channels]."""
        return self._builder.info.features["image"].decode_example(encoded)


def _builder(name, data_dir):
    if name == Digits.name:
        return Digits(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, AssertionError):  # the latter for versions it does not have
        raise ValueError(
            f"dataset {name!r} is not in TFDS; known here: digits, cifar10, folder:PATH, or any TFDS name"
        ) from None


def _check_features(features, name):
    if not {"image", "label"} <= set(features or {}):
        raise ValueError(f"dataset {name!r} has no image and label, but {', '.join(features or ['nothing'])}")
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise ValueError(f"the label of dataset {name!r} is no class, but {features['label']}")


def _prepare(builder, name, data_dir):
    """Downloads the set, unless it is there or the user has said where it should be; digits are made in any case."""
    if builder.is_prepared():
        return
    if data_dir is not None and name != Digits.name:
        raise FileNotFoundError(
            f"data_dir {data_dir!r} does not hold the dataset {name!r} (looked for {builder.data_path}); "
            "point it at a TFDS directory that does, or leave it out to download the set"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # of many kinds: a set that one has to fetch by hand, ImageNet for one; no network
        raise FileNotFoundError(f"TFDS cannot download and prepare the dataset {name!r} by itself: {error}") from None
