"""Random crops and flips of training images, and mixup; every draw depends on the given seed alone."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from tf_repvgg.data import rand_augment
from tf_repvgg.data.preprocessing import resize_image

CROPS = ("pad", "random_resized")
# Area relative to the image's, and width over height, of random resized crops, as in Inception (arXiv:1409.4842) and
# torchvision.
_AREA_RANGE = (0.08, 1.0)
_ASPECT_RATIO_RANGE = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation of training images.

    Attributes:
      crop: Kind of the random crops, one of `CROPS`.
      crop_padding: Pixels that `pad_and_crop` adds on every side.
      flip: Whether half of the images are mirrored.
      rand_augment_operations: Number of operations of RandAugment per image; 0 for none.
      rand_augment_magnitude: Strength of the operations of RandAugment, from 0 to 30.
      mixup_alpha: Alpha of mixup; 0 for none.

    Raises:
      ValueError: If a value is unknown or out of range.
    """

    crop: str
    crop_padding: int
    flip: bool
    rand_augment_operations: int
    rand_augment_magnitude: float
    mixup_alpha: float

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; known: {', '.join(CROPS)}")
        rand_augment.check_settings(self.rand_augment_operations, self.rand_augment_magnitude)
        if not 0 <= self.mixup_alpha < math.inf:
            raise ValueError(f"mixup's alpha is {self.mixup_alpha:g}; it must be 0 or more")


def draw_crops(count: int | tf.Tensor, seed: tf.Tensor | Sequence[int]) -> tf.Tensor:
    """Draws what `pad_and_crop` does with each image of a batch: float32 [3, count, 1], from 0 to 1.

    Args:
      count: Number of images in the batch.
      seed: Two integers.
    """
    return tf.random.stateless_uniform([3, count, 1], seed)


def pad_and_crop(images: tf.Tensor, size: tuple[int, int], padding: int, flip: bool, draws: tf.Tensor) -> tf.Tensor:
    """Pads a batch of images, crops each image at random, and on request mirrors half of them.

    It works on whole batches: image by image, these few small operations took a tenth of a training step.

    Args:
      images: Images [batch, height, width, channels].
      size: Height and width of the crops.
      padding: Pixels added on every side.
      flip: Whether half of the images are mirrored.
      draws: Random numbers of these images, see `draw_crops`.

    Returns:
      Images [batch, *size, channels].
    """
    height, width = size
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    _, padded_height, padded_width, _ = tf.unstack(tf.shape(padded))
    offsets = tf.cast(tf.stack([padded_height - height + 1, padded_width - width + 1]), tf.float32)
    top, left = tf.unstack(tf.cast(draws[:2] * offsets[:, tf.newaxis, tf.newaxis], tf.int32))
    rows = tf.gather(padded, top + tf.range(height), batch_dims=1, axis=1)
    columns = left + tf.range(width)
    if flip:
        columns = tf.where(draws[2] < 0.5, columns, columns[:, ::-1])
    return tf.gather(rows, columns, batch_dims=1, axis=2)


def mixup(
    images: tf.Tensor, labels: tf.Tensor, num_classes: int, alpha: float, seed: tf.Tensor | Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each image of a batch, and its label, with another image of the batch (arXiv:1710.09412).

    The whole batch has one ratio, drawn from Beta(alpha, alpha). Each image is mixed with the image at the same place
    from the end of the batch, since batches are shuffled anyway.

    Args:
      images: Float images [batch, height, width, channels].
      labels: Integer labels [batch].
      num_classes: Number of classes.
      alpha: Parameter of the beta distribution, above 0; small values mix little.
      seed: Two integers.

    Returns:
      Mixed images, and float32 probabilities [batch, num_classes].
    """
    # Not the seed itself, from which the crops are drawn.
    seed = tf.random.fold_in(tf.cast(tf.stack(seed), tf.int64), 1)
    first, second = tf.unstack(tf.random.stateless_gamma([2], seed, alpha))
    # For tiny alphas both may underflow to 0.
    ratio = tf.math.divide_no_nan(first, first + second)
    probabilities = tf.one_hot(labels, num_classes)
    return tuple(ratio * tensor + (1 - ratio) * tensor[::-1] for tensor in (images, probabilities))


def random_resized_crop(
    encoded: tf.Tensor,
    decode: Callable[[tf.Tensor], tf.Tensor],
    channels: int,
    size: tuple[int, int],
    flip: bool,
    seed: tf.Tensor | Sequence[int],
) -> tf.Tensor:
    """Cuts a random window out of an encoded image and resizes it, and on request mirrors it half of the time.

    Of a JPEG only the window is decoded. TensorFlow's `sample_distorted_bounding_box` draws the windows: area and
    aspect ratio have the same ranges as in torchvision, but slightly different distributions.

    Args:
      encoded: Bytes of the image file, a scalar string tensor.
      decode: Function that decodes an image file of any other format to uint8 [height, width, channels].
      channels: Number of channels of the result.
      size: Height and width of the result.
      flip: Whether half of the images are mirrored.
      seed: Two integers.

    Returns:
      Image uint8 [*size, channels].
    """

    # Two seeds: with one, the flip would depend on the window.
    window_seed, flip_seed = tf.unstack(tf.random.split(seed))

    def crop_while_decoding():
        window = _draw_window(tf.image.extract_jpeg_shape(encoded), window_seed)
        return tf.image.decode_and_crop_jpeg(encoded, window, channels)

    def decode_and_crop():
        image = decode(encoded)
        top, left, height, width = tf.unstack(_draw_window(tf.shape(image), window_seed))
        return image[top : top + height, left : left + width]

    image = tf.cond(tf.io.is_jpeg(encoded), crop_while_decoding, decode_and_crop)
    image = tf.ensure_shape(resize_image(image, size), [*size, channels])
    return tf.image.stateless_random_flip_left_right(image, flip_seed) if flip else image


def _draw_window(shape, seed):
    """A random window [top, left, height, width] of an image."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=_ASPECT_RATIO_RANGE,
        area_range=_AREA_RANGE,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)
