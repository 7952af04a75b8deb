"""A folder of the user's own images, each checked before anything is trained on it."""

import functools
import hashlib
import os
from pathlib import Path

import tensorflow as tf

PREFIX = "folder:"
BAD_IMAGES = ("refuse", "skip")
MAX_MEGAPIXELS = 50.0
# Name of a split: names that its folder may have.
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class ImageFolder:
    """The encoded images and labels of a folder laid out as for `tfds.ImageFolder`: PATH/train/<label>/<image>.

    Beside "train" there are "test", "validation" (or "val"), or both. Files and folders whose names start with a dot
    are ignored. Unusual images are treated as follows:

    - Palettes, grey, CMYK and 16-bit images become 8-bit RGB. Alpha is dropped: transparent pixels show the colour
      that is stored beneath. Orientation tags (EXIF) are not applied.
    - Bad images are: empty, damaged or truncated files, files that are not JPEG, PNG, GIF or BMP images, animations,
      BMPs with a palette, images of more than `max_megapixels` (according to the header, before anything is decoded),
      files larger than such an image can be, and folders inside the folder of a class. Each is reported on stderr.

    `tfds.ImageFolder` itself cannot split "train", and silently skips files that it does not recognize.

    Args:
      name: "folder:PATH".
      data_dir: Folder that PATH is relative to; None for the current folder.
      bad_images: Treatment of bad images: "refuse" raises if there are any, "skip" leaves them out.
      max_megapixels: Largest usable image, in millions of pixels. Decoding and resizing takes 15 bytes per pixel.
      splits_may_differ: Whether each split may have any number of classes, also others than "train".

    Attributes:
      name: "folder:" and the folder's own name, without the path to it.
      labels: Names of the classes, in the order of their numbers.
      image_shape: Height and width, which are None, and the number of channels, 3.
      flips: Whether a mirrored image belongs to the same class: True.
      splits: Names of the splits.

    Raises:
      FileNotFoundError: If the folder is missing.
      ValueError: If it has no "train", a class without images, and, unless `splits_may_differ`, fewer than two classes
        or a class in another split that "train" lacks; or if there are bad images, and `bad_images` is "refuse".

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> import tensorflow as tf
      >>> from tf_repvgg.data import ImageFolder
      >>> root = pathlib.Path(tempfile.mkdtemp())
      >>> for label in ("cat", "dog"):
      ...     (root / "train" / label).mkdir(parents=True)
      ...     png = tf.io.encode_png(np.zeros((8, 8, 3), np.uint8)).numpy()
      ...     (root / "train" / label / "picture.png").write_bytes(png) > 0
      True
      True
      >>> folder = ImageFolder(f"folder:{root}")
      >>> folder.labels, folder.num_examples("train")
      (('cat', 'dog'), 2)
    """

    image_shape = (None, None, 3)
    flips = True

    def __init__(
        self,
        name: str,
        data_dir: str | None = None,
        bad_images: str = "refuse",
        max_megapixels: float = MAX_MEGAPIXELS,
        splits_may_differ: bool = False,
    ) -> None:
        import tensorflow_datasets as tfds  # slow to import

        from tf_repvgg.data import image_checks  # imports Pillow

        root = Path(os.path.abspath(Path(data_dir or "", name.removeprefix(PREFIX)).expanduser()))
        self.name = PREFIX + root.name
        if not root.is_dir():
            raise FileNotFoundError(
                f"folder {str(root)!r} does not exist; give --dataset=folder:PATH, and with --data_dir the folder that "
                "PATH is relative to"
            )
        files = {split: _list_classes(folder) for split, folder in _find_split_folders(root).items()}
        _check_classes(files, self.name, splits_may_differ)
        paths = [path for classes in files.values() for paths in classes.values() for path in paths]
        bad = image_checks.report_bad_images(paths, root, max_megapixels)
        if bad and bad_images == "refuse":
            raise ValueError(
                f"{len(bad)} of the images of {self.name!r} cannot be used, see above; repair or remove them, or leave "
                "them out with --bad_images=skip"
            )
        files = {
            split: {label: [path for path in paths if path not in bad] for label, paths in classes.items()}
            for split, classes in files.items()
        }
        _check_classes(files, self.name, splits_may_differ)
        self.labels = tuple(sorted({label for classes in files.values() for label in classes}))
        self.splits = list(files)
        self._files = {split: self._make_examples(classes, root) for split, classes in files.items()}
        self._infos = tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(name=split, shard_lengths=[len(paths)], num_bytes=0)
                for split, (paths, _) in self._files.items()
            ]
        )

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits as TFDS writes them: "train[:90%]"."""
        return sum(len(indices) for _, indices in self._read_parts(split))

    def list_examples(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """Paths of images and int64 labels, in a fixed order that mixes the classes, or shuffled as a whole."""
        parts = [
            tf.data.Dataset.from_tensor_slices(self._files[name]).skip(indices.start).take(len(indices))
            for name, indices in self._read_parts(split)
        ]
        dataset = functools.reduce(tf.data.Dataset.concatenate, parts)
        if shuffle_seed is not None:
            dataset = dataset.shuffle(self.num_examples(split), shuffle_seed, reshuffle_each_iteration=False)
        return dataset

    def read(self, reference: tf.Tensor) -> tf.Tensor:
        """Reads the image file (bytes) of a path."""
        return tf.io.read_file(reference)

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes an image file to uint8 [height, width, 3]."""
        from tf_repvgg.data import image_checks

        return image_checks.decode(encoded)

    def _make_examples(self, classes, root):
        """Tensors of all paths and labels of a split, in the order of a hash of the paths.

        Hence a part of the split has images of every class, and a new or missing image moves no other from training to
        validation data, except next to the cut.
        """
        examples = [(path, self.labels.index(label)) for label, paths in classes.items() for path in paths]
        examples.sort(key=lambda example: hashlib.sha256(os.fsencode(example[0].relative_to(root))).digest())
        paths, labels = zip(*examples, strict=True)
        return tf.constant([os.fsencode(path) for path in paths]), tf.constant(labels, tf.int64)

    def _read_parts(self, split):
        """[(name of a whole split, range of its images)]."""
        import tensorflow_datasets as tfds

        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(self._infos)
        sizes = {name: info.num_examples for name, info in self._infos.items()}
        return [(part.splitname, range(sizes[part.splitname])[part.from_ : part.to]) for part in parts]


def _list_entries(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _find_split_folders(root):
    """{split: its folder}."""
    folders = {}
    for split, names in _SPLIT_FOLDERS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise ValueError(f"folder {root.name!r} has both {' and '.join(names)}; remove one of them")
        if present:
            folders[split] = present[0]
    if "train" not in folders:
        raise ValueError(f"folder {root.name!r} has no folder 'train'; put the images into {root.name}/train/<label>/")
    return folders


def _list_classes(folder):
    """{label: everything in its folder}."""
    classes = [path for path in _list_entries(folder) if path.is_dir()]
    for path in classes:
        try:
            path.name.encode()
        except UnicodeEncodeError:  # no JSON file could hold the label
            raise ValueError(f"the name of the class folder {str(path)!r} is not UTF-8; rename the folder") from None
    return {path.name: _list_entries(path) for path in classes}


def _check_classes(files, name, splits_may_differ):
    """Checks {split: {label: paths}}."""
    labels = files["train"].keys()
    if splits_may_differ:
        for split, classes in files.items():
            if not classes:
                raise ValueError(f"{name!r} has no class in {split}; put images into {split}/<label>/")
    elif len(labels) < 2:
        raise ValueError(
            f"{name!r} has {len(labels)} class{'es' * (len(labels) != 1)} in train; a classifier needs at least two "
            "folders train/<label>/"
        )
    for split, classes in files.items():
        for label, paths in classes.items():
            if label not in labels and not splits_may_differ:
                raise ValueError(f"{name!r} has the class {label!r} in {split} but not in train")
            if not paths:
                raise ValueError(f"{name!r} has no usable image of the class {label!r} in {split}; add some")
