"""Checks that every way to an integer file shares: of models, weights, and settings by layer."""

import numbers
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import by_name, graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.codebooks import NUMBERS_OF_CLUSTERS
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, holds_float_kernel, name_weighted_layers
from tf_repvgg.quantization.uniform import GRANULARITIES, WEIGHT_BITS


def check_fused(model: keras.Model) -> None:
    """Refuses models with blocks in training form or with wrappers for training.

    Args:
      model: Any Keras model.

    Raises:
      ValueError: If there is such a layer. The message names it, and the function to be called first.
    """
    for layer in graph.find_layers(model):
        if strip := getattr(layer, "stripped_by", None):
            raise ValueError(
                f"layer {layer.name!r} is still in training; call tf_repvgg.quantization.{strip}(model) first"
            )
        if isinstance(layer, ReparameterizedBlock):
            raise ValueError(f"block {layer.name!r} is still in training form; call tf_repvgg.fusion.fuse(model) first")


def check_finite(layer: keras.layers.Layer, *tensors: tf.Tensor) -> None:
    """Refuses weights that are not finite.

    Args:
      layer: Layer whose weights are checked.
      *tensors: Further tensors of the layer to be checked.

    Raises:
      ValueError: If one of them holds infinities or NaN. The message names the layer.
    """
    for tensor in (*tensors, *layer.weights):
        if not bool(tf.reduce_all(tf.math.is_finite(tensor))):
            raise ValueError(f"layer {layer.name!r} holds infinities or NaN; was training stable?")


def bits_by_layer(model: keras.Model, weight_bits: int | str | Mapping[str, int]) -> dict[str, int]:
    """Resolves the weight bits of each Conv2D, Conv2DTranspose, DepthwiseConv2D and Dense layer of a model.

    Args:
      model: Functional model.
      weight_bits: Bits of a weight, from 2 to 8, or bits by pattern of layer names, first match wins; also as text:
        "stem=8,.*=4".

    Returns:
      {layer name as in `tf_repvgg.graph.unique_names`: bits}.

    Raises:
      ValueError: If bits are out of range, a pattern matches no layer or comes too late, or a layer matches no pattern.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import checks
      >>> model = keras.Sequential([keras.layers.Dense(2, name="stem"), keras.layers.Dense(2, name="logits")])
      >>> model.build((None, 3))
      >>> checks.bits_by_layer(model, "stem=8,.*=4")
      {'stem': 8, 'logits': 4}
    """
    return _numbers_by_layer(model, weight_bits, "weight bits", WEIGHT_BITS, WEIGHTED_LAYERS)


def clusters_by_layer(
    model: keras.Model,
    number_of_clusters: int | str | Mapping[str, int],
    classes: tuple[type, ...] = WEIGHTED_LAYERS,
) -> dict[str, int]:
    """Resolves the number of clusters of each layer of a model.

    Args:
      model: Functional model.
      number_of_clusters: Number of clusters in a codebook, from 2 to 256, or numbers by pattern of layer names, as for
        `bits_by_layer`.
      classes: Classes of the layers to be clustered.

    Returns:
      {layer name as in `tf_repvgg.graph.unique_names`: number of clusters}.

    Raises:
      ValueError: If a number is out of range, a pattern matches no layer or comes too late, or a layer matches no
        pattern.
    """
    return _numbers_by_layer(model, number_of_clusters, "numbers of clusters", NUMBERS_OF_CLUSTERS, classes)


def per_channel_by_layer(
    model: keras.Model,
    per_channel: bool | str | Mapping[str, bool],
    classes: tuple[type, ...] = WEIGHTED_LAYERS,
) -> dict[str, bool]:
    """Resolves for each layer of a model whether every output channel has a scale or a codebook of its own.

    Args:
      model: Functional model.
      per_channel: Whether it has, or that by pattern of layer names, first match wins; also as text with names of
        granularities: "stem=per_channel,.*=per_tensor".
      classes: Classes of the layers.

    Returns:
      {layer name as in `tf_repvgg.graph.unique_names`: whether it has}.

    Raises:
      ValueError: If a granularity is unknown, a pattern matches no layer or comes too late, or a layer matches no
        pattern.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import checks
      >>> model = keras.Sequential([keras.layers.Dense(2, name="stem"), keras.layers.Dense(2, name="logits")])
      >>> model.build((None, 3))
      >>> checks.per_channel_by_layer(model, "stem=per_channel,.*=per_tensor")
      {'stem': True, 'logits': False}
    """

    def parse_granularity(value):
        if value in GRANULARITIES:
            return value == "per_channel"
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"a granularity is {value!r}; known: {', '.join(GRANULARITIES)}")
        return bool(value)

    values = by_name.parse(per_channel, parse_granularity, "granularities")
    return by_name.resolve(values, _find_weighted_layers(model, classes), "granularities")


def _numbers_by_layer(model, value, description, allowed, classes):
    def parse_number(number):
        if isinstance(number, str) and number.isascii() and number.isdigit():
            number = int(number)
        is_whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)  # includes those of NumPy
        if not (is_whole and number in allowed):
            raise ValueError(
                f"{description} are {number!r}; they must be a whole number from {allowed[0]} to {allowed[-1]}"
            )
        return int(number)

    values = by_name.parse(value, parse_number, description)
    return by_name.resolve(values, _find_weighted_layers(model, classes), description)


def _find_weighted_layers(model, classes):
    """The names of the layers of some classes whose weights are not on a grid already; at least one."""
    unique_names = graph.unique_names(model)
    layer_names = [unique_names[id(layer)] for layer in graph.leaves(model) if holds_float_kernel(layer, classes)]
    if not layer_names:
        raise ValueError(
            f"{model.name!r} has no {name_weighted_layers('or')} layer of its own, whose weights could be "
            "quantized; tf_repvgg.tflite.convert writes its other weights with 8 bits"
        )
    return layer_names
