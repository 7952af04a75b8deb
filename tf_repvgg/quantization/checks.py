"""What may be quantized, how far, and on which images: checks that every way to an integer file shares."""

import numbers
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import by_name, graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS


def check_fused(model: keras.Model) -> None:
    """Raises ValueError if a block is still in training form, or a layer in a wrapper for training; names it."""
    for layer in graph.find_layers(model):
        if strip := getattr(layer, "stripped_by", None):
            raise ValueError(
                f"layer {layer.name!r} is still in training; call tf_repvgg.quantization.{strip}(model) first"
            )
        if isinstance(layer, ReparameterizedBlock):
            raise ValueError(f"block {layer.name!r} is still in training form; call tf_repvgg.fusion.fuse(model) first")


def check_finite(layer, *tensors) -> None:
    """Raises ValueError if weights of a layer, or more tensors of it, hold infinities or NaN; names it."""
    for tensor in (*tensors, *layer.weights):
        if not bool(tf.reduce_all(tf.math.is_finite(tensor))):
            raise ValueError(f"layer {layer.name!r} holds infinities or NaN; was training stable?")


def validate_images(calibration, input_shape) -> list[np.ndarray]:
    """Calibration images as a list of float32 batches of one.

    Args:
      calibration: iterable of images [height, width, channels].
      input_shape: (batch, height, width, channels) of the model; height and width may be None.

    Raises:
      ValueError: if there are none, or one has another shape or is not finite; names it.
    """
    if any(isinstance(part, tuple) for part in input_shape):
        raise ValueError(f"calibration images are for models of one input, and this one has {len(input_shape)}")
    shape = tuple(input_shape[1:])
    images = []
    for index, image in enumerate(calibration):
        image = np.asarray(image, np.float32)
        if not tf.TensorShape(shape).is_compatible_with(image.shape):
            raise ValueError(f"calibration image {index} has shape {image.shape}; the model's input is {shape}")
        if not np.all(np.isfinite(image)):
            raise ValueError(f"calibration image {index} holds infinities or NaN")
        images.append(image[np.newaxis])
    if not images:
        raise ValueError("there are no calibration images; activation ranges need at least one")
    return images


def values_by_layer(
    model: keras.Model,
    value: int | str | Mapping[str, int],
    description: str,
    lowest: int,
    highest: int,
    kinds: tuple[type, ...] = WEIGHTED_LAYERS,
) -> dict[str, int]:
    """The number of each layer, such as its weight bits.

    Args:
      model: Functional model; names are those of `tf_repvgg.graph.unique_names`.
      value: One number, or numbers by name pattern as `tf_repvgg.by_name.parse` reads them: "stem=8,.*=4".
      description: Name of the numbers in messages, such as "weight bits".
      lowest: Smallest number allowed.
      highest: Largest number allowed.
      kinds: Classes of the layers, by default Conv2D, DepthwiseConv2D and Dense.

    Returns:
      {layer name: number}.

    Raises:
      ValueError: For a number out of range, and as `tf_repvgg.by_name.parse` and `tf_repvgg.by_name.resolve`.
    """

    def parse_number(number):
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        is_whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)  # NumPy's are, too
        if not (is_whole and lowest <= number <= highest):
            raise ValueError(f"{description} are {number!r}; they must be a whole number from {lowest} to {highest}")
        return int(number)

    values = by_name.parse(value, parse_number, description)
    unique = graph.unique_names(model)
    names = [unique[id(layer)] for layer in graph.leaves(model) if isinstance(layer, kinds)]
    return by_name.resolve(values, names, description)
