"""What may be quantized, how far, and on which images: checks that every way to an integer file shares."""

import difflib
import numbers
import re
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.activations import WEIGHTED


def check_fused(model: keras.Model) -> None:
    """Raises ValueError if a block is still in training form, or a layer in a wrapper for training; names it."""
    for layer in model._flatten_layers():
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


def checked_images(calibration, input_shape) -> list[np.ndarray]:
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


def by_layer(
    model: keras.Model, value: int | str | Mapping[str, int], what: str, lowest: int, highest: int, classes=WEIGHTED
) -> dict[str, int]:
    """{layer name: a number such as its weight bits} of the layers of some classes, by the first pattern that matches.

    Args:
      model: functional model; names are those of `tf_repvgg.graph.unique_names`.
      value: 4, "4", {pattern: number} with regular expressions of whole names, or that as text: "stem=8,.*=4".
      what: what the numbers are, for messages: "weight bits".
      lowest, highest: numbers allowed.
      classes: of the layers, by default Conv2D, DepthwiseConv2D and Dense.

    Raises:
      ValueError: for a number out of range, a pattern that is no regular expression, matches no layer, or only layers
        that an earlier one matches, and a layer that no pattern matches.
    """
    patterns = _parse_by_layer(value, what, lowest, highest)
    unique = graph.unique_names(model)
    names = [unique[id(layer)] for layer in graph.leaves(model) if isinstance(layer, classes)]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names) or names
            raise ValueError(f"pattern {pattern!r} of {what} matches no layer; there are: {', '.join(near)}")
    first = {}
    for name in names:
        first[name] = next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)
        if first[name] is None:
            raise ValueError(f"no pattern of {what} matches layer {name!r}; add '.*' as the last one")
    if idle := [pattern for pattern in patterns if pattern not in first.values()]:
        raise ValueError(
            f"pattern {idle[0]!r} of {what} comes too late: all layers that it matches have the number of an earlier "
            "one; put it first"
        )
    return {name: patterns[pattern] for name, pattern in first.items()}


def _parse_by_layer(value, what, lowest, highest):
    if isinstance(value, str):
        value = dict(part.rpartition("=")[::2] if "=" in part else (".*", part) for part in value.split(","))
    elif not isinstance(value, Mapping):
        value = {".*": value}
    found = {}
    for pattern, number in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{what} for pattern {pattern!r}: not a regular expression ({error})") from None
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        is_whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)  # also NumPy's
        if not (is_whole and lowest <= number <= highest):
            raise ValueError(f"{what} are {number!r}; they must be a whole number from {lowest} to {highest}")
        found[pattern] = int(number)
    return found
