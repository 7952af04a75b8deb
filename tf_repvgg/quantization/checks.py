"""What may be quantized, and on which images: checks that every way to an integer file shares."""

import numpy as np
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock


def check_fused(model: keras.Model) -> None:
    """Raises ValueError if a block is still in training form; names it."""
    for layer in model._flatten_layers():
        if isinstance(layer, ReparameterizedBlock):
            raise ValueError(f"block {layer.name!r} is still in training form; call tf_repvgg.fusion.fuse(model) first")


def checked_images(calibration, input_shape) -> list[np.ndarray]:
    """Calibration images as a list of float32 batches of one.

    Args:
      calibration: iterable of images [height, width, channels].
      input_shape: (batch, height, width, channels) of the model; height and width may be None.

    Raises:
      ValueError: if there are none, or one has another shape or is not finite; names it.
    """
    shape = tuple(input_shape[1:])
    images = []
    for index, image in enumerate(calibration):
        image = np.asarray(image, np.float32)
        if len(image.shape) != 3 or any(size not in (None, its) for size, its in zip(shape, image.shape, strict=True)):
            raise ValueError(f"calibration image {index} has shape {image.shape}; the model's input is {shape}")
        if not np.all(np.isfinite(image)):
            raise ValueError(f"calibration image {index} holds infinities or NaN")
        images.append(image[np.newaxis])
    if not images:
        raise ValueError("there are no calibration images; activation ranges need at least one")
    return images
