"""A folder of one's own images, each checked before anything is trained on it."""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from tf_repvgg import native_output

PREFIX = "folder:"
BAD_IMAGES = ("refuse", "skip")
MAX_MEGAPIXELS = 50.0
_CHANNELS = 3
# Name of a split: names that its folder may have.
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_FORMATS = ("JPEG", "PNG", "GIF", "BMP")  # what TensorFlow decodes and Pillow opens without decoding
_BMP_MODES = ("RGB", "RGBA", "L")  # in others TensorFlow takes indices into a palette for grey levels
# A JPEG of several pictures, as phones write it: previews and depth maps behind the photo.
_MULTI_PICTURE = "MPO"
_MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA, not compressed


class ImageFolder:
    """The encoded images and labels of a folder laid out as for `tfds.ImageFolder`: PATH/train/<label>/<image>.

    Beside "train" there are "test", "validation" (or "val"), or both. Files and folders whose names start with a dot
    do not count. What becomes of unusual images:

    - Palettes, grey, CMYK and 16-bit images become 8-bit RGB. Alpha is dropped: transparent pixels show the colour
      that is stored beneath. Orientation tags (EXIF) are not applied.
    - Bad are: empty, damaged or truncated files, whatever is no JPEG, PNG, GIF or BMP, animations, BMPs with a palette,
      images of more than `max_megapixels` (found in the header, before anything is decoded), files larger than such
      an image can be, and folders inside the folder of a class. Each is named on stderr.

    `tfds.ImageFolder` itself has no parts of splits, and passes over what it does not know.

    Attributes: those of `TfdsSource`; `name` is "folder:" and the folder's own name, without the path to it.

    Args:
      name: "folder:PATH".
      data_dir: folder that PATH starts from, where it is not absolute; None for the current one.
      bad_images: "refuse" to raise if there are any, "skip" to leave them out.
      max_megapixels: millions of pixels that an image may have; to decode and resize one takes 15 bytes for each.

    Raises:
      FileNotFoundError: if the folder is missing.
      ValueError: if it has no "train", fewer than two classes, a class without images, or one in another split that
        "train" lacks; or if there are bad images and they are to be refused.
    """

    image_shape = (None, None, _CHANNELS)
    flips = True

    def __init__(self, name, data_dir=None, bad_images="refuse", max_megapixels=MAX_MEGAPIXELS):
        root = Path(os.path.abspath(Path(data_dir or "", name.removeprefix(PREFIX)).expanduser()))
        self.name = PREFIX + root.name
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {str(root)!r}; give --dataset=folder:PATH, or with --data_dir the folder where PATH starts"
            )
        found = {split: _classes(folder) for split, folder in _split_folders(root).items()}
        _check_classes(found, self.name)
        bad = _named_bad_images(found, root, max_megapixels)
        if bad and bad_images == "refuse":
            raise ValueError(
                f"{len(bad)} of the images of {self.name!r} cannot be used, see above; repair or remove them, or leave "
                "them out with --bad_images=skip"
            )
        found = {
            split: {label: [path for path in paths if path not in bad] for label, paths in classes.items()}
            for split, classes in found.items()
        }
        _check_classes(found, self.name)
        self.labels = tuple(sorted(found["train"]))
        self.splits = list(found)
        self._files = {split: self._examples(classes, root) for split, classes in found.items()}
        self._infos = tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(name=split, shard_lengths=[len(paths)], num_bytes=0)
                for split, (paths, _) in self._files.items()
            ]
        )

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits as TFDS writes them: "train[:90%]"."""
        return sum(len(indices) for _, indices in self._parts(split))

    def encoded(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """(bytes of an image file, int64 label), in a fixed order that mixes the classes, or shuffled as a whole."""
        parts = [
            tf.data.Dataset.from_tensor_slices(self._files[name]).skip(indices.start).take(len(indices))
            for name, indices in self._parts(split)
        ]
        dataset = functools.reduce(tf.data.Dataset.concatenate, parts)
        if shuffle_seed is not None:
            dataset = dataset.shuffle(self.num_examples(split), shuffle_seed, reshuffle_each_iteration=False)
        return dataset.map(lambda path, label: (tf.io.read_file(path), label))

    def decode(self, encoded):
        """An image file's bytes to uint8 [height, width, 3]."""
        return _decode(encoded)

    def _examples(self, classes, root):
        """Tensors of all paths and labels of a split.

        In the order of a hash of the paths: so a part of the split has images of every class, and an image that comes
        or goes moves no other from training to validation data but those next to the cut.
        """
        labelled = [(path, self.labels.index(label)) for label, paths in classes.items() for path in paths]
        labelled.sort(key=lambda example: hashlib.sha256(os.fsencode(example[0].relative_to(root))).digest())
        paths, labels = zip(*labelled, strict=True)
        return tf.constant([os.fsencode(path) for path in paths]), tf.constant(labels, tf.int64)

    def _parts(self, split):
        """[(name of a whole split, range of its images)]."""
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(self._infos)
        sizes = {name: info.num_examples for name, info in self._infos.items()}
        return [(part.splitname, range(sizes[part.splitname])[part.from_ : part.to]) for part in parts]


def _entries(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _split_folders(root):
    """{split: its folder}."""
    folders = {}
    for split, names in _SPLIT_FOLDERS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise ValueError(f"folder {root.name!r} has both {' and '.join(names)}; which is meant? Remove one")
        if present:
            folders[split] = present[0]
    if "train" not in folders:
        raise ValueError(f"folder {root.name!r} has no folder 'train'; images belong into {root.name}/train/<label>/")
    return folders


def _classes(folder):
    """{label: everything in its folder}."""
    return {path.name: _entries(path) for path in _entries(folder) if path.is_dir()}


def _check_classes(found, name):
    labels = found["train"].keys()
    if len(labels) < 2:
        raise ValueError(
            f"{name!r} has {len(labels)} classes in train; a classifier needs at least two folders train/<label>/"
        )
    for split, classes in found.items():
        for label, paths in classes.items():
            if label not in labels:
                raise ValueError(f"{name!r} has the class {label!r} in {split} but not in train")
            if not paths:
                raise ValueError(f"{name!r} has no usable image of the class {label!r} in {split}; add some")


def _named_bad_images(found, root, max_megapixels):
    """Names every image that cannot be used, and why, on stderr as soon as it is found; returns their paths."""
    paths = [path for classes in found.values() for paths in classes.values() for path in paths]
    bad = set()
    with (
        os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr,
        native_output.hide(),  # TensorFlow's own words on damaged files
        _large_headers_allowed(),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        # disable=None: no bar where nobody sees it move, so that a log has nothing but the named images.
        tqdm(total=len(paths), desc="checking images", unit="image", leave=False, disable=None, file=stderr) as bar,
    ):
        defects = pool.map(functools.partial(_defect, max_pixels=max_megapixels * 1e6), paths)
        for path, defect in zip(paths, defects, strict=True):
            if defect:
                bad.add(path)
                tqdm.write(f"bad image {str(path.relative_to(root))!r}: {defect}", file=stderr)
            bar.update()
    return bad


@contextlib.contextmanager
def _large_headers_allowed():
    """Lets Pillow open images of any declared size: it decodes nothing yet, and `_defect` has a limit of its own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _defect(path, max_pixels):
    """Why an image cannot be used, in a few words; None if it can."""
    if not path.is_file():
        return "no file"
    if not (size := path.stat().st_size):
        return "empty"
    if size > _MAX_BYTES_PER_PIXEL * max_pixels:
        return f"{size:,} bytes are more than {max_pixels / 1e6:g} megapixels can have"
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return f"{width}x{height} is more than {max_pixels / 1e6:g} megapixels"
            if image.format == "BMP" and image.mode not in _BMP_MODES:
                return "a BMP with a palette"
            if image.format != _MULTI_PICTURE and getattr(image, "is_animated", False):
                return f"animated {image.format}"
            kind = image.format
    except PermissionError:
        return "cannot be read"
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to.
        return f"no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image"
    try:
        _decode(tf.io.read_file(os.fsencode(path)))
    except tf.errors.OpError:
        return f"damaged or truncated {kind}"
    return None


def _decode(encoded):
    image = tf.io.decode_image(encoded, _CHANNELS, expand_animations=False)
    return tf.ensure_shape(image, ImageFolder.image_shape)
