"""Layers that integer files do not have, and what stands in their place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers.batch_norm import OutlierAwareBatchNormalization, scale_and_shift
from tf_repvgg.layers.separable_convolution import split_separable_convolution
from tf_repvgg.quantization.lowering import activations
from tf_repvgg.quantization.lowering.affine import spread_constant
from tf_repvgg.quantization.lowering.builder import Builder
from tf_repvgg.quantization.lowering.dilation import as_convolution, is_dilated
from tf_repvgg.quantization.lowering.sequences import SEQUENCE_LAYERS, as_layer_of_images
from tf_repvgg.quantization.quantized_layers import is_quantizable

# Has the arguments of the layer's calls, and returns None for a call that stays as it is.
Replacement = Callable[..., Any]


def find_replacement(layer: keras.layers.Layer, build: Builder) -> Replacement | None:
    """Makes what takes the place of a layer; None if the layer stays.

    Args:
      layer: Any layer that is not an operator.
      build: Builder for this layer.
    """
    rule = _RULES.get(type(layer), _lower_weighted if is_quantizable(layer) else None)
    return None if rule is None else rule(layer, build)


def _lower_batch_normalization(layer, build):
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)

    def call(inputs, training=None, **_):
        if training or axes not in ([-1], [len(inputs.shape) - 1]):
            return None
        return build.affine(inputs, build.owner, *(np.asarray(value) for value in scale_and_shift(layer)))

    return call


def _lower_rescaling(layer, build):
    def call(inputs, **_):
        factor, offset = (spread_constant(value, inputs.shape) for value in (layer.scale, layer.offset))
        return None if factor is None or offset is None else build.affine(inputs, build.owner, factor, offset)

    return call


def _lower_normalization(layer, build):
    deviation = np.maximum(np.sqrt(layer.variance), keras.backend.epsilon())

    def call(inputs, **_):
        mean, spread = (spread_constant(value, inputs.shape) for value in (layer.mean, deviation))
        if mean is None or spread is None:
            return None
        if layer.invert:
            return build.affine(inputs, build.owner, spread, mean)
        return build.affine(inputs, build.owner, 1 / spread, -mean / spread)

    return call


def _lower_relu(layer, build):
    slope, limit = (None if value is None else float(value) for value in (layer.negative_slope, layer.max_value))
    # With a threshold the function jumps, which no grid follows; a limit of 0 leaves nothing but negative values.
    if np.any(layer.threshold) or limit is None or limit <= 0 or (limit == 6 and not slope):
        return None
    if slope:
        return lambda inputs: activations.leaky_relu(build, inputs, build.owner, slope, limit)
    return lambda inputs: activations.limit_relu(build, inputs, build.owner, limit)


def _lower_prelu(layer, build):
    def call(inputs, **_):
        slope = spread_constant(layer.alpha, inputs.shape)
        return None if slope is None else activations.parametric_relu(build, inputs, build.owner, slope)

    return call


def _lower_elu(layer, build):
    return lambda inputs, **_: activations.elu(build, inputs, build.owner, float(layer.alpha))


def _lower_activation(layer, build):
    function = activations.ACTIVATIONS.get(_activation_name(layer))
    return function and (lambda inputs, **_: function(build, inputs, build.owner))


def _lower_average(layer, build):
    def call(inputs):
        total = build.chain(keras.layers.Add, inputs, f"{build.owner}_sum")
        return build.affine(total, build.owner, 1 / len(inputs))

    return call


def _lower_merge(layer, build):
    return lambda inputs: build.chain(type(layer), inputs, build.owner) if len(inputs) > 2 else None


def _lower_dense(layer, build):
    """On a map of features, a 1x1 convolution: the converter computes a dense layer there once for every reader."""
    if len(getattr(layer, "input_shape", ())) != 4:  # it has none if its calls have different ones
        return _lower_weighted(layer, build)
    changes, finish = _split_activation(layer, build)
    config = layer.get_config() | {"dtype": layer.variable_dtype, "name": build.claim(build.owner)} | changes
    convolution = keras.layers.Conv2D.from_config(config | {"filters": config.pop("units"), "kernel_size": 1})
    kernel, *bias = layer.get_weights()

    def call(inputs):
        outputs = convolution(inputs)
        convolution.set_weights([kernel[np.newaxis, np.newaxis], *bias])
        return finish(outputs)

    return call


def _lower_weighted(layer, build):
    changes, finish = _split_activation(layer, build)
    if is_dilated(layer):
        convolution = as_convolution(layer, build.claim(build.owner), build.claim(f"{build.owner}_padding"), **changes)
        return lambda inputs: finish(convolution(inputs))
    is_transposed = isinstance(layer, keras.layers.Conv2DTranspose) and layer.data_format == "channels_first"
    if not (changes or is_transposed):
        return None
    if is_transposed:  # the only convolution that Keras computes with the channels first everywhere
        changes["data_format"] = "channels_last"
    linear = graph.copy_layer(layer, name=build.claim(build.owner), **changes)
    if not is_transposed:
        return lambda inputs: finish(linear(inputs))
    before = keras.layers.Permute((2, 3, 1), name=build.claim(f"{build.owner}_channels_last"))
    after = keras.layers.Permute((3, 1, 2), name=build.claim(f"{build.owner}_channels_first"))
    return lambda inputs: after(finish(linear(before(inputs))))


def _lower_separable(layer, build):
    changes, finish = _split_activation(layer, build)
    names = build.claim(f"{build.owner}_depthwise"), build.claim(build.owner)
    split = split_separable_convolution(layer, *names, **changes)
    return lambda inputs: finish(split(inputs))


def _lower_sequence_layer(layer, build):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    if isinstance(layer, keras.layers.Conv1DTranspose) and layer.dilation_rate != (1,):
        return None  # Keras has no dilation rate of one axis for images
    changes, finish = _split_activation(layer, build)
    as_images = as_layer_of_images(layer, build.claim(build.owner), build.claim, **changes)
    return lambda inputs, **_: finish(as_images(inputs))


def _lower_time_distributed(layer, build):
    """A dense layer treats every step alike without a wrapper."""
    if type(layer.layer) is not keras.layers.Dense:
        return None
    changes, finish = _split_activation(layer.layer, build)
    dense = graph.copy_layer(layer.layer, name=build.claim(build.owner), **changes)
    return lambda inputs, **_: finish(dense(inputs))


def _split_activation(layer, build):
    """Changes to a layer's configuration, and a function that finishes the outputs of the changed layer."""
    activation = _activation_name(layer)
    function = activations.ACTIVATIONS.get(activation)
    if function is None:
        return {}, lambda outputs: outputs
    return {"activation": "linear"}, lambda outputs: function(build, outputs, f"{build.owner}_{activation}")


def _activation_name(layer):
    return getattr(getattr(layer, "activation", None), "__name__", None)


# Exactly these classes: a subclass may compute something else.
_RULES: dict[type, Callable[[Any, Builder], Replacement | None]] = {
    keras.layers.Activation: _lower_activation,
    keras.layers.Add: _lower_merge,
    keras.layers.Average: _lower_average,
    keras.layers.Dense: _lower_dense,
    keras.layers.ELU: _lower_elu,
    keras.layers.Maximum: _lower_merge,
    keras.layers.Minimum: _lower_merge,
    keras.layers.Multiply: _lower_merge,
    keras.layers.Normalization: _lower_normalization,
    keras.layers.PReLU: _lower_prelu,
    keras.layers.ReLU: _lower_relu,
    keras.layers.Rescaling: _lower_rescaling,
    keras.layers.SeparableConv2D: _lower_separable,
    keras.layers.TimeDistributed: _lower_time_distributed,
    **{
        norm: _lower_batch_normalization
        for norm in (
            keras.layers.BatchNormalization,
            keras.layers.experimental.SyncBatchNormalization,
            OutlierAwareBatchNormalization,
        )
    },
    **dict.fromkeys(SEQUENCE_LAYERS, _lower_sequence_layer),
}
