"""Preprocessing of every image before a model sees it, in training, evaluation, calibration and use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

# Mean and standard deviation of pixels 0 to 255. "imagenet": per channel, as for RepVGG and torchvision's networks;
# "inception": -1 to 1, as mode "tf" of keras.applications; "unit": 0 to 1; "none": for networks that rescale pixels
# themselves.
NORMALIZATIONS: dict[str, tuple[float | tuple[float, ...], float | tuple[float, ...]]] = {
    "symmetric": (128.0, 128.0),
    "inception": (127.5, 127.5),
    "unit": (0.0, 255.0),
    "none": (0.0, 1.0),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

_MAX_ASPECT_RATIO = 8


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resizes images to `size`, and normalizes their pixels, 0 to 255: ``(pixel - mean) / std``.

    The default maps pixels to -1 .. 127/128. Calibrated on images with black and white pixels, that is scale 1/128 and
    zero point 0, so that the int8 input of an exported model is simply the pixel minus 128.

    Attributes:
      size: Height and width; None for the size of a dataset's images, if all have the same.
      mean: Mean of the pixels, one number or one per channel.
      std: Standard deviation of the pixels, one number or one per channel.
      resize_shorter_side: Length of the shorter side, in pixels, to which an image is resized before its centre of
        `size` is cut out; None to stretch the whole image to `size`.

    Raises:
      ValueError: If std is not positive, mean and std differ in length, or the resized image may be smaller than
        `size`.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.data import Preprocessing
      >>> preprocessing = Preprocessing(size=(2, 2))
      >>> image = preprocessing.resize(np.full((4, 6, 1), 192, np.uint8))
      >>> preprocessing(image).numpy().ravel().tolist()
      [0.5, 0.5, 0.5, 0.5]
    """

    size: tuple[int, int] | None = None
    mean: float | tuple[float, ...] = 128.0
    std: float | tuple[float, ...] = 128.0
    resize_shorter_side: int | None = None

    def __post_init__(self) -> None:
        if len(_per_channel(self.mean)) != len(_per_channel(self.std)):
            raise ValueError(f"mean {self.mean} and std {self.std} differ in their number of channels")
        if min(_per_channel(self.std)) <= 0:
            raise ValueError(f"std is {self.std}; it must be above 0")
        if self.resize_shorter_side is None:
            return
        if self.size is None:
            raise ValueError(
                f"resizing the shorter side to {self.resize_shorter_side} needs a size for the crop; give one"
            )
        if self.resize_shorter_side < max(self.size):
            raise ValueError(
                f"size {self.size} does not fit into images whose shorter side is resized to "
                f"{self.resize_shorter_side}; resize to more, or give a smaller size"
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Preprocessing":
        """Reads the result of `metadata` from among other entries; older versions did not write all of them."""
        arguments: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in metadata:
                value = metadata[field.name]
                arguments[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**arguments)

    def metadata(self) -> dict[str, Any]:
        """The attributes, JSON-serializable."""
        return dataclasses.asdict(self)

    def check_channels(self, channels: int) -> None:
        """
        Raises:
          ValueError: If images with this number of channels cannot be normalized.
        """
        if (count := len(_per_channel(self.mean))) not in (1, channels):
            raise ValueError(f"the normalization is for images of {count} channels, but these have {channels}")

    def __call__(self, images: Any) -> tf.Tensor:
        """Normalizes images [..., height, width, channels], uint8 or float, to float32; does not resize them."""
        return (tf.cast(images, tf.float32) - self.mean) / self.std

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of a normalized image."""
        ends = [
            (pixel - mean) / std
            for mean, std in zip(_per_channel(self.mean), _per_channel(self.std), strict=True)
            for pixel in (0, 255)
        ]
        return min(ends), max(ends)

    def resize(self, image: Any) -> tf.Tensor:
        """Resizes one uint8 image [height, width, channels] to uint8 [*size, channels].

        Raises:
          ValueError: If `size` is None.
        """
        if self.size is None:
            raise ValueError("this Preprocessing has no size to resize to")
        if self.resize_shorter_side is None:
            return resize_image(image, self.size)
        image = _limit_aspect_ratio(image)
        height, width = tf.unstack(tf.shape(image)[:2])
        # As in torchvision, the longer side is rounded down, and half pixels are rounded to even.
        resized = self.resize_shorter_side * tf.stack([height, width]) // tf.minimum(height, width)
        image = resize_image(image, resized)
        top, left = tf.unstack(tf.cast(tf.round((resized - self.size) / 2), tf.int32))
        return image[top : top + self.size[0], left : left + self.size[1]]


def _per_channel(value):
    return value if isinstance(value, tuple) else (value,)


def _limit_aspect_ratio(image):
    """The image, or the middle of one so long that resizing its shorter side would take much memory."""
    height, width = tf.unstack(tf.shape(image)[:2])
    longest = _MAX_ASPECT_RATIO * tf.minimum(height, width)
    top, left = tf.maximum(height - longest, 0) // 2, tf.maximum(width - longest, 0) // 2
    return image[top : height - top, left : width - left]


def resize_image(image: Any, size: Any) -> tf.Tensor:
    """Resizes a uint8 image [height, width, channels] to uint8 [*size, channels].

    Bilinear, with antialiasing where the image shrinks.
    """
    image = tf.image.resize(image, size, antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)
