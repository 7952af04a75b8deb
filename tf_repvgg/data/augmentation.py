"""Random crops and flips of training images, and mixup; every draw depends on the given seed alone."""

import tensorflow as tf

from tf_repvgg.data.preprocessing import resize_image

CROPS = ("pad", "random_resized")
# Share of the image's area, and width over height, of random resized crops: those of Inception (arXiv:1409.4842) and
# of torchvision.
_AREA_RANGE = (0.08, 1.0)
_ASPECT_RATIO_RANGE = (3 / 4, 4 / 3)


def pad_and_crop(images, size, padding, flip, seed):
    """Pads a batch by `padding` pixels, crops each image to `size` at random, and flips half of them if asked to.

    On whole batches: per image, these few small operations took a tenth of a training step.
    """
    height, width = size
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    count, padded_height, padded_width, _ = tf.unstack(tf.shape(padded))
    draws = tf.random.stateless_uniform([3, count, 1], seed)
    offsets = tf.cast(tf.stack([padded_height - height + 1, padded_width - width + 1]), tf.float32)
    top, left = tf.unstack(tf.cast(draws[:2] * offsets[:, tf.newaxis, tf.newaxis], tf.int32))
    rows = tf.gather(padded, top + tf.range(height), batch_dims=1, axis=1)
    columns = left + tf.range(width)
    if flip:
        columns = tf.where(draws[2] < 0.5, columns, columns[:, ::-1])
    return tf.gather(rows, columns, batch_dims=1, axis=2)


def mixup(images, labels, num_classes, alpha, seed):
    """Mixes each image of a batch, and its label, with another of the batch (arXiv:1710.09412).

    One share for the batch, drawn from Beta(alpha, alpha); the other image is the one at the same place from the end,
    as batches are shuffled anyway.

    Args:
      images: float tensor [batch, height, width, channels].
      labels: integers [batch].
      num_classes: number of classes.
      alpha: above 0; small ones mix little.
      seed: two integers.

    Returns:
      Images as they came, and float32 probabilities [batch, num_classes].
    """
    # Another stream than that of the crops, which are drawn from the seed itself.
    seed = tf.random.fold_in(tf.cast(tf.stack(seed), tf.int64), 1)
    first, second = tf.unstack(tf.random.stateless_gamma([2], seed, alpha))
    # Of tiny alphas both may underflow to 0.
    share = tf.math.divide_no_nan(first, first + second)
    labels = tf.one_hot(labels, num_classes)
    return tuple(share * both + (1 - share) * both[::-1] for both in (images, labels))


def random_resized_crop(encoded, decode, channels, size, flip, seed):
    """Cuts a random window out of an encoded image and resizes it to `size`; flips it half of the time if asked to.

    Of a JPEG only the window is decoded. Windows are drawn by TensorFlow's `sample_distorted_bounding_box`: area and
    aspect ratio range as in torchvision, though not drawn from quite the same distribution.

    Args:
      encoded: bytes of the image, a scalar string tensor.
      decode: decodes them whole; for what is no JPEG.
      channels: of the result.
      size: (height, width) of the result.
      flip: whether to mirror half of the images.
      seed: two integers.

    Returns:
      uint8 [height, width, channels].
    """

    # Two seeds: from one, the flip would depend on the window.
    window_seed, flip_seed = tf.unstack(tf.random.split(seed))

    def of_jpeg():
        window = _random_window(tf.image.extract_jpeg_shape(encoded), window_seed)
        return tf.image.decode_and_crop_jpeg(encoded, window, channels)

    def of_another():
        image = decode(encoded)
        top, left, height, width = tf.unstack(_random_window(tf.shape(image), window_seed))
        return image[top : top + height, left : left + width]

    image = tf.cond(tf.io.is_jpeg(encoded), of_jpeg, of_another)
    image = tf.ensure_shape(resize_image(image, size), [*size, channels])
    return tf.image.stateless_random_flip_left_right(image, flip_seed) if flip else image


def _random_window(shape, seed):
    """[top, left, height, width]."""
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
