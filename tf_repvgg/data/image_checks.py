"""Images that cannot be used: found before anything is trained on them, and reported on stderr."""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Collection
from pathlib import Path

import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from tf_repvgg import native_output

CHANNELS = 3
_FORMATS = ("JPEG", "PNG", "GIF", "BMP")  # TensorFlow decodes them, and Pillow opens them without decoding
_BMP_MODES = ("RGB", "RGBA", "L")  # in other modes TensorFlow takes indices into a palette for grey levels
# A JPEG of several pictures, as phones write it: previews and depth maps behind the photo.
_MULTI_PICTURE = "MPO"
_MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA, not compressed


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes an image file to uint8 [height, width, 3]; of an animation, the first frame."""
    image = tf.io.decode_image(encoded, CHANNELS, expand_animations=False)
    return tf.ensure_shape(image, [None, None, CHANNELS])


def report_bad_images(paths: Collection[Path], root: Path, max_megapixels: float) -> set[Path]:
    """Reports every image that cannot be used, with the reason, on stderr.

    Args:
      paths: Image files.
      root: Folder that the reported paths are relative to.
      max_megapixels: Largest usable image, in millions of pixels.

    Returns:
      Paths of the reported images.
    """
    bad = set()
    with (
        os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr,
        native_output.hide(),  # TensorFlow's own messages about damaged files
        _without_pillows_limit(),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        # disable=None: no bar unless stderr is a terminal, so that a log contains nothing but the reported images.
        tqdm(total=len(paths), desc="checking images", unit="image", leave=False, disable=None, file=stderr) as bar,
    ):
        defects = pool.map(functools.partial(find_defect, max_pixels=max_megapixels * 1e6), paths)
        for path, defect in zip(paths, defects, strict=True):
            if defect:
                bad.add(path)
                tqdm.write(f"bad image {str(path.relative_to(root))!r}: {defect}", file=stderr)
            bar.update()
    return bad


@contextlib.contextmanager
def _without_pillows_limit():
    """Lets Pillow open images of any declared size: it decodes nothing yet, and `find_defect` has its own limit."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def find_defect(path: Path, max_pixels: float) -> str | None:
    """The reason why an image cannot be used, in a few words; None if it can be used.

    The size is read from the header, before anything is decoded.
    """
    if not path.is_file():
        return "not a file"
    if not (size := path.stat().st_size):
        return "empty"
    if size > _MAX_BYTES_PER_PIXEL * max_pixels:
        return f"its {size:,} bytes are more than an image of {max_pixels / 1e6:g} megapixels can have"
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return f"{width}x{height} is more than {max_pixels / 1e6:g} megapixels"
            if image.format == "BMP" and image.mode not in _BMP_MODES:
                return "a BMP with a palette"
            if image.format != _MULTI_PICTURE and getattr(image, "is_animated", False):
                return f"animated {image.format}"
            image_format = image.format
    except PermissionError:
        return "no permission to read it"
    except Exception:  # A damaged header makes Pillow's parsers raise errors of any kind.
        return f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image"
    try:
        decode(tf.io.read_file(os.fsencode(path)))
    except tf.errors.OpError:
        return f"damaged or truncated {image_format}"
    return None
