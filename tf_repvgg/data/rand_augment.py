"""RandAugment (arXiv:1909.13719): operations drawn at random for each image, all with the same strength.

Libraries with all of its operations need PyTorch or OpenCV, or no longer run; Keras 3 draws one choice of operations
for a whole batch, and rotates images by up to 180 degrees.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

MAX_MAGNITUDE = 30
# The paper (arXiv:1909.13719) uses up to 3. Each takes its time for each image.
MAX_OPERATIONS = 16


def check_settings(operations: int, magnitude: float) -> None:
    """
    Raises:
      ValueError: If the number of operations is not from 0 to 16, or the magnitude is not from 0 to 30.
    """
    if not 0 <= operations <= MAX_OPERATIONS:
        raise ValueError(f"RandAugment's number of operations is {operations}; it must be from 0 to {MAX_OPERATIONS}")
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"RandAugment's magnitude is {magnitude:g}; it must be from 0 to {MAX_MAGNITUDE}")


def augment_image(image: np.ndarray, operations: int, magnitude: float, generator: np.random.Generator) -> np.ndarray:
    """Applies operations to one image, each drawn with equal chance.

    Args:
      image: Image uint8 [height, width, channels] of 1 or 3 channels.
      operations: Number of operations, N in the paper.
      magnitude: Common strength of the operations from 0 to 30, M in the paper.
      generator: NumPy generator of all draws.

    Returns:
      Image uint8 of the same shape.
    """
    from PIL import Image

    from tf_repvgg.data.image_operations import OPERATIONS

    table = tuple(OPERATIONS.values())
    is_grey = image.shape[-1] == 1
    augmented = Image.fromarray(image[..., 0] if is_grey else image)
    for operation, largest, is_signed in (table[index] for index in generator.integers(len(table), size=operations)):
        sign = generator.choice((-1, 1)) if is_signed else 1
        augmented = operation(augmented, float(sign * largest * magnitude / MAX_MAGNITUDE))
    return np.asarray(augmented).reshape(image.shape)


def rand_augment(images: tf.Tensor, operations: int, magnitude: float, seed: tf.Tensor | Sequence[int]) -> tf.Tensor:
    """Applies `augment_image` to each image of a batch, as a TensorFlow operation; draws depend on `seed` alone.

    Args:
      images: Images uint8 [batch, height, width, channels] of 1 or 3 channels.
      operations: Number of operations per image.
      magnitude: Common strength of the operations from 0 to 30.
      seed: Two integers, 0 or more.

    Returns:
      Images uint8 of the same shape.
    """

    def augment(batch, seed):
        generator = np.random.default_rng(seed)
        return np.stack([augment_image(image, operations, magnitude, generator) for image in batch])

    augmented = tf.numpy_function(augment, [images, tf.cast(tf.stack(seed), tf.int64)], tf.uint8, stateful=False)
    return tf.ensure_shape(augmented, images.shape)
