"""Places quantizers in a Keras model wherever an integer TFLite file of it rounds activations."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, holds_float_kernel
from tf_repvgg.quantization.relu_fusion import fuses_relu
from tf_repvgg.quantization.uniform import largest_code

# Ranges that TFLite prescribes for the outputs of these activations: in 8 bits, and one for all in 16 bits.
_FIXED_RANGES = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
_FIXED_RANGE_16 = (-largest_code(16) / 2**15, largest_code(16) / 2**15)

_FUSED_ACTIVATIONS = ("linear", "relu", "relu6")
# `_activation_name` of a Keras layer that computes nothing; no function can have this name.
_IDENTITY = "<identity>"
# Layers that change images in training, and do nothing otherwise.
AUGMENTATIONS = (
    keras.layers.RandomBrightness,
    keras.layers.RandomContrast,
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
)
# Layers that compute nothing when a model is not in training, and that files do not have.
IDENTITIES = (
    *AUGMENTATIONS,
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.SpatialDropout2D,
)
# TFLite gives the outputs of these layers the scale of their input; with a grid of their own they would not convert.
RANGE_PRESERVING = (
    *IDENTITIES,
    keras.layers.AveragePooling2D,
    keras.layers.CenterCrop,
    keras.layers.Cropping2D,
    keras.layers.Flatten,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling2D,
    keras.layers.Permute,
    keras.layers.Reshape,
    keras.layers.Resizing,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)
# TFLite has the inputs of these layers on the grid of their output.
SHARING_GRID = (keras.layers.Concatenate, keras.layers.Maximum, keras.layers.Minimum)


def quantizers(model: keras.Model) -> list[ActivationQuantizer]:
    """The activation quantizers of a model, in the order of its layers.

    Args:
      model: Any Keras model.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import quantize_activations, quantizers
      >>> model = keras.Sequential([keras.Input((4,), name="image"), keras.layers.Dense(2, name="logits")])
      >>> [quantizer.name for quantizer in quantizers(quantize_activations(model))]
      ['image_quantizer', 'logits_quantizer']
    """
    return graph.find_layers(model, ActivationQuantizer)


def quantize_activations(
    model: keras.Model,
    replace_weighted: Callable[[keras.layers.Layer, dict[str, Any]], Callable] | None = None,
    make_quantizer: Callable[..., Callable] = ActivationQuantizer,
    weighted: tuple[type, ...] = WEIGHTED_LAYERS,
    bits: int = 8,
) -> keras.Model:
    """Copies a fused model, with a quantizer wherever an integer TFLite file of it rounds.

    That is after inputs and after every operation that computes, with two exceptions: after operations whose output has
    the grid of their input (reshaping, padding, upsampling, and pooling other than the global mean), and between an
    operation and the ReLU that is fused with it (see `tf_repvgg.quantization.relu_fusion`). Activations other than ReLU
    become layers of their own. Nested models become part of the copy, whose layers have the names of
    `tf_repvgg.graph.unique_names`.

    Args:
      model: Functional deploy-form model.
      replace_weighted: Function (layer, changes to its configuration: name and activation) -> callable on tensors that
        takes the place of the layer. By default layers are copied.
      make_quantizer: Function that makes each quantizer from keyword arguments of `ActivationQuantizer`.
      weighted: Classes of the layers that `replace_weighted` replaces, unless they are quantized already.
      bits: Bits of activations, 8 or 16.

    Returns:
      A functional model. Its quantizers are named "<layer>_quantizer", and have no range yet.

    Raises:
      ValueError: If the model is not functional, or for other bits.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import quantize_activations
      >>> inputs = keras.Input((8, 8, 3), name="image")
      >>> features = keras.layers.ReLU(name="relu")(keras.layers.Conv2D(4, 3, name="conv")(inputs))
      >>> quantized = quantize_activations(keras.Model(inputs, keras.layers.Flatten(name="flat")(features)))
      >>> [layer.name for layer in quantized.layers]
      ['image', 'image_quantizer', 'conv', 'relu', 'relu_quantizer', 'flat']
    """
    if not graph.is_functional(model):
        raise ValueError(f"quantization needs a functional Keras 2 model, but got {type(model).__name__}")
    names = graph.unique_names(model)
    without_grid = _find_layers_without_grid(_inline_nested_models(model, names))
    replace_weighted = replace_weighted or (lambda layer, changes: graph.copy_layer(layer, **changes))
    calls: collections.Counter[str] = collections.Counter()

    def quantize(tensors, name, **options):
        def quantize_tensor(tensor):
            if not tensor.dtype.is_floating:
                return tensor
            calls[name] += 1
            suffix = f"_{calls[name]}" if calls[name] > 1 else ""
            return make_quantizer(name=f"{name}_quantizer{suffix}", bits=bits, **options)(tensor)

        return tf.nest.map_structure(quantize_tensor, tensors)

    def replace(layer):
        name = names[id(layer)]
        activation = _activation_name(layer)
        options = _quantizer_options(activation, bits)
        is_replaced = holds_float_kernel(layer, weighted)
        if is_replaced and activation not in (None, *_FUSED_ACTIVATIONS):
            linear = replace_weighted(layer, {"name": name, "activation": "linear"})
            activate = keras.layers.Activation(layer.activation, name=f"{name}_activation")
            return lambda *arguments, **keywords: quantize(
                activate(quantize(linear(*arguments, **keywords), name)), f"{name}_activation", **options
            )
        copy = replace_weighted(layer, {"name": name}) if is_replaced else graph.copy_layer(layer, name=name)
        if isinstance(layer, RANGE_PRESERVING) or name in without_grid or activation == _IDENTITY:
            return copy
        return lambda *arguments, **keywords: quantize(copy(*arguments, **keywords), name, **options)

    def replace_input(tensor):
        return quantize(tensor, tensor.node.layer.name)

    return graph.rebuild(model, replace, replace_input, inline_nested=True)


def copy_without_rounding(model: keras.Model) -> keras.Model:
    """Copies a fused model as `quantize_activations` does, with layers that compute nothing in place of quantizers.

    Args:
      model: Functional deploy-form model.

    Raises:
      ValueError: If the model is not functional.
    """
    return quantize_activations(model, make_quantizer=lambda name, **_: keras.layers.Activation("linear", name=name))


def quantizer_before(tensor: Any) -> ActivationQuantizer:
    """The quantizer whose grid a tensor of a quantized model is on.

    Args:
      tensor: Keras tensor of a functional model.

    Raises:
      ValueError: If there is no quantizer between the model's input and the tensor.
    """
    while not isinstance(layer := tensor.node.layer, ActivationQuantizer):
        if tensor.node.is_input:
            raise ValueError(f"the input {layer.name!r} is not quantized; put an ActivationQuantizer after it")
        tensor = tf.nest.flatten(tensor.node.keras_inputs)[0]
    return layer


def relu_name(layer: keras.layers.ReLU) -> str | None:
    """Keras's name of the activation that a ReLU layer computes, "relu" or "relu6"; None for any other kind of ReLU.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.activations import relu_name
      >>> [relu_name(keras.layers.ReLU(*limits)) for limits in [(), (6.0,), (4.0,), (6.0, 0.1)]]
      ['relu', 'relu6', None, None]
    """
    if np.any(layer.negative_slope) or np.any(layer.threshold):
        return None
    # Keras keeps the limit as a NumPy array, which no dictionary takes.
    return {None: "relu", 6.0: "relu6"}.get(None if layer.max_value is None else float(layer.max_value))


def _activation_name(layer):
    """Keras's name of the activation that a layer ends with, `_IDENTITY`, or None if the layer has no activation."""
    if isinstance(layer, keras.layers.ReLU):
        return relu_name(layer)
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", None)
    return _IDENTITY if name == "linear" and isinstance(layer, keras.layers.Activation) else name


def _quantizer_options(activation, bits):
    if activation in _FIXED_RANGES:
        return {"fixed_range": _FIXED_RANGES[activation] if bits == 8 else _FIXED_RANGE_16}
    return {"nonnegative": True} if activation in ("relu", "relu6") else {}


def _inline_nested_models(model, names):
    """The model, or a copy with the layers of nested models in their place, under the given names."""
    if graph.functional_models(model) == [model]:
        return model
    return graph.rebuild(model, lambda layer: graph.copy_layer(layer, name=names[id(layer)]), inline_nested=True)


def _find_layers_without_grid(model):
    """Names of the layers that compute, but whose outputs runtimes round on the grid of what alone reads them.

    Runtimes fuse a linear layer with the ReLU after it. The converter has layers write on the grid of a concatenation.
    """
    readers = collections.defaultdict(list)
    for node in graph.nodes(model):
        for key in node.flat_input_ids:
            readers[key].append(node)
    outputs = graph.output_keys(model)

    def find_only_reader(key):
        """(the node that alone reads a tensor, past layers that files do not have; whether a Permute is in between)"""
        is_permuted = False
        while key not in outputs and len({id(node) for node in readers[key]}) == 1:
            reader = readers[key][0]  # a concatenation may read an output more than once
            is_permuted |= isinstance(reader.layer, keras.layers.Permute)
            is_identity = isinstance(reader.layer, IDENTITIES) or _activation_name(reader.layer) == _IDENTITY
            if not (is_identity or isinstance(reader.layer, keras.layers.Permute)):
                return reader.layer, is_permuted
            (key,) = reader.flat_output_ids
        return None, is_permuted

    def is_rounded_by_reader(node, key):
        reader, is_permuted = find_only_reader(key)
        activation = _activation_name(node.layer)
        if isinstance(reader, SHARING_GRID):
            return activation not in _FIXED_RANGES and not is_permuted
        # Other layers, such as a block, end with a ReLU that does not come right after what they read.
        if not isinstance(reader, keras.layers.Activation | keras.layers.ReLU) or activation not in (None, "linear"):
            return False
        # The converter moves a ReLU before a Permute, but no ReLU6.
        kinds = ("relu",) if is_permuted else ("relu", "relu6")
        return _activation_name(reader) in kinds and fuses_relu(node)

    with_grid: set[str] = set()
    without_grid: set[str] = set()
    for node in graph.nodes(model):
        if not isinstance(node.layer, RANGE_PRESERVING):
            is_rounded = all(is_rounded_by_reader(node, key) for key in node.flat_output_ids)
            (without_grid if is_rounded else with_grid).add(node.layer.name)
    return without_grid - with_grid
