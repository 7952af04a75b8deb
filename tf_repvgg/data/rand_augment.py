"""RandAugment (arXiv:1909.13719) on Pillow, whose operations it is made of.

Libraries that have it whole need PyTorch or OpenCV, or no longer run; that of Keras 3 draws one choice of operations
for a batch, and turns images by up to 180 degrees.
"""

import functools

import numpy as np
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30
# What geometric operations uncover: the mean of "symmetric" preprocessing.
_FILL = 128


def _affine(image, *coefficients):
    fill = (_FILL,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)


def _rotate(image, degrees):
    fill = (_FILL,) * len(image.getbands())
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _enhance(enhancer, image, strength):
    return enhancer(image).enhance(1 + strength)


# {name: (operation(image, strength), strength at the largest magnitude, whether its sign is drawn)}: the paper's
# fourteen, with the ranges of torchvision's RandAugment. `strength` grows linearly with the magnitude.
OPERATIONS = {
    "identity": (lambda image, _: image, 0, False),
    "shear_x": (lambda image, shear: _affine(image, 1, shear, 0, 0, 1, 0), 0.3, True),
    "shear_y": (lambda image, shear: _affine(image, 1, 0, 0, shear, 1, 0), 0.3, True),
    "translate_x": (lambda image, part: _affine(image, 1, 0, part * image.width, 0, 1, 0), 150 / 331, True),
    "translate_y": (lambda image, part: _affine(image, 1, 0, 0, 0, 1, part * image.height), 150 / 331, True),
    "rotate": (_rotate, 30, True),
    "brightness": (functools.partial(_enhance, ImageEnhance.Brightness), 0.9, True),
    "color": (functools.partial(_enhance, ImageEnhance.Color), 0.9, True),
    "contrast": (functools.partial(_enhance, ImageEnhance.Contrast), 0.9, True),
    "sharpness": (functools.partial(_enhance, ImageEnhance.Sharpness), 0.9, True),
    "posterize": (lambda image, lost_bits: ImageOps.posterize(image, 8 - round(lost_bits)), 4, False),
    "solarize": (lambda image, part: ImageOps.solarize(image, round(256 * (1 - part))), 1, False),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, False),
}


def check(operations, magnitude):
    """
    Raises:
      ValueError: if the number of operations is below 0, or the magnitude not from 0 to 30.
    """
    if operations < 0:
        raise ValueError(f"RandAugment's number of operations is {operations}; it must be 0 or more")
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"RandAugment's magnitude is {magnitude:g}; it must be from 0 to {MAX_MAGNITUDE}")


def augment_image(image, operations, magnitude, generator):
    """Applies so many operations, drawn one by one with equal chance, to one image.

    Args:
      image: uint8 array [height, width, channels] of 1 or 3 channels.
      operations: number of operations, N in the paper.
      magnitude: their common strength from 0 to 30, M in the paper.
      generator: NumPy generator that everything is drawn from.

    Returns:
      uint8 array of the same shape.
    """
    grey = image.shape[-1] == 1
    augmented = Image.fromarray(image[..., 0] if grey else image)
    for operation, largest, signed in (_TABLE[index] for index in generator.integers(len(_TABLE), size=operations)):
        sign = generator.choice((-1, 1)) if signed else 1
        augmented = operation(augmented, float(sign * largest * magnitude / MAX_MAGNITUDE))
    return np.asarray(augmented).reshape(image.shape)


_TABLE = tuple(OPERATIONS.values())


def rand_augment(images, operations, magnitude, seed):
    """`augment_image` on each image of a batch, as a TensorFlow operation; every draw depends on `seed` alone.

    Args:
      images: uint8 tensor [batch, height, width, channels] of 1 or 3 channels.
      operations, magnitude: see `augment_image`.
      seed: two integers above or equal to 0.
    """

    def augment(batch, seed):
        generator = np.random.default_rng(seed)
        return np.stack([augment_image(image, operations, magnitude, generator) for image in batch])

    augmented = tf.numpy_function(augment, [images, tf.cast(tf.stack(seed), tf.int64)], tf.uint8, stateful=False)
    return tf.ensure_shape(augmented, images.shape)
