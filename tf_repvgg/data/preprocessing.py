"""What happens to every image before a model sees it, in training, evaluation, calibration and in use."""

import dataclasses

import tensorflow as tf

# Mean and standard deviation of pixels 0 to 255. "imagenet": per channel, as RepVGG and torchvision's networks have it.
NORMALIZATIONS = {
    "symmetric": (128.0, 128.0),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

_MAX_ASPECT_RATIO = 8


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model expects: ``(pixel - mean) / std`` on pixels 0 to 255 of images of `size`.

    The default maps pixels to -1 .. 127/128. Calibrated on images with black and white pixels that is scale 1/128 and
    zero point 0, so that the int8 input of an exported model is just the pixel minus 128.

    Attributes:
      size: (height, width); None for that of the images of a dataset, where all have the same.
      mean, std: one number, or one per channel.
      resize_shorter_side: pixels that the shorter side is resized to before the centre of `size` is cut out; None to
        stretch the whole image to `size`.

    Raises:
      ValueError: if std is not positive, mean and std differ in length, or what is to be cut out does not fit.
    """

    size: tuple[int, int] | None = None
    mean: float | tuple[float, ...] = 128.0
    std: float | tuple[float, ...] = 128.0
    resize_shorter_side: int | None = None

    def __post_init__(self):
        if len(self._per_channel(self.mean)) != len(self._per_channel(self.std)):
            raise ValueError(f"mean {self.mean} and std {self.std} are not of the same channels")
        if min(self._per_channel(self.std)) <= 0:
            raise ValueError(f"std is {self.std}; it must be above 0")
        if self.resize_shorter_side is not None and self.size is None:
            raise ValueError(
                f"to resize the shorter side to {self.resize_shorter_side} needs a size to cut out; give it"
            )
        if self.resize_shorter_side is not None and self.resize_shorter_side < max(self.size):
            raise ValueError(
                f"size {self.size} does not fit into images whose shorter side is resized to "
                f"{self.resize_shorter_side}; resize to more, or give a smaller size"
            )

    @classmethod
    def from_facts(cls, facts):
        """Reads what `facts` gave, among other entries perhaps; entries that older versions did not write may lack."""
        known = {field.name: facts[field.name] for field in dataclasses.fields(cls) if field.name in facts}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})

    def facts(self) -> dict:
        """The attributes, JSON-serializable."""
        return dataclasses.asdict(self)

    def check_channels(self, channels):
        """
        Raises:
          ValueError: if images of so many channels cannot be normalised.
        """
        if (count := len(self._per_channel(self.mean))) not in (1, channels):
            raise ValueError(f"the normalization is for images of {count} channels, but these have {channels}")

    def __call__(self, images):
        """uint8 or float images [..., height, width, channels] to normalised float32 ones, not resized."""
        return (tf.cast(images, tf.float32) - self.mean) / self.std

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value that a normalised image can hold."""
        ends = [
            (pixel - mean) / std
            for mean, std in zip(self._per_channel(self.mean), self._per_channel(self.std), strict=True)
            for pixel in (0, 255)
        ]
        return min(ends), max(ends)

    def resize(self, image):
        """One uint8 image [height, width, channels] of any size to uint8 [*size, channels]."""
        if self.resize_shorter_side is None:
            return resize_image(image, self.size)
        image = _middle(image)
        height, width = tf.unstack(tf.shape(image)[:2])
        # The longer side is rounded down, and half pixels are rounded to even: torchvision cuts out the same.
        larger = self.resize_shorter_side * tf.stack([height, width]) // tf.minimum(height, width)
        image = resize_image(image, larger)
        top, left = tf.unstack(tf.cast(tf.round((larger - self.size) / 2), tf.int32))
        return image[top : top + self.size[0], left : left + self.size[1]]

    @staticmethod
    def _per_channel(value):
        return value if isinstance(value, tuple) else (value,)


def _middle(image):
    """The image, or the middle of one that is so long that resizing its shorter side would take much memory."""
    height, width = tf.unstack(tf.shape(image)[:2])
    longest = _MAX_ASPECT_RATIO * tf.minimum(height, width)
    top, left = tf.maximum(height - longest, 0) // 2, tf.maximum(width - longest, 0) // 2
    return image[top : height - top, left : width - left]


def resize_image(image, size):
    """Bilinear, with antialiasing where it gets smaller; uint8 in and out."""
    image = tf.image.resize(image, size, antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)
