"""What integers allow: the distance of a right file from its quantized model, and from the float model.

Both bounds come from running the models with errors of rounding put in by hand, without the library's own quantizers.
"""

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization import ActivationQuantizer

_WITH_ACTIVATION = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
# TFLite prescribes the grids of these activations, however narrow their values are: 2^-bits times this.
_WIDTHS = {"sigmoid": 1.0, "softmax": 1.0, "tanh": 2.0}
# Share of the values that a kernel may round to a code above, and as many to a code below; and how many codes further:
# kernels interpolate the tables of 16-bit functions.
_MOVED_SHARE, _MOVED_CODES = 0.05, {8: 1, 16: 16}
_LARGEST_STRETCH = 1.28


def round_naively(
    model: keras.Model, inputs: list[np.ndarray], weight_bits: float, activation_bits: int, seed: int | None = None
) -> list[np.ndarray]:
    """Runs a float model with rounded weights, inputs and outputs of layers.

    Every kernel, and every matrix that an operation takes as a constant, is rounded to a symmetric grid of its own, and
    every layer's output to the grid from its smallest to its largest value on the images. A layer with an activation
    rounds before it too.

    Args:
      model: Fused float model.
      inputs: One array [count, ...] for each input.
      weight_bits: Bits of a weight; a fraction for grids between two widths.
      activation_bits: Bits of an activation.
      seed: Seed of factors on the steps of the weights, one for each kernel: other errors of about the same size. None
        for no factors.

    Returns:
      Outputs, each [count, ...], in the order of `tf.nest.flatten`.
    """
    steps = 2.0**activation_bits - 1
    stretches = None if seed is None else np.random.default_rng(seed)

    def round_values(values, activation=None):
        if not values.dtype.is_floating:
            return values
        low, high = min(float(tf.reduce_min(values)), 0.0), max(float(tf.reduce_max(values)), 0.0)
        prescribed = _WIDTHS.get(activation, 0.0) / 2**activation_bits
        step = max((high - low) / steps, prescribed, np.finfo(np.float32).tiny)
        return tf.round(values / step) * step

    def replace(layer):
        if graph.is_functional(layer):
            return lambda tensors, **_: graph.replay(layer, tf.nest.flatten(tensors), replace)
        activation = getattr(layer, "activation", None)
        weights = [_round_kernel(weight, weight_bits, stretches) for weight in layer.get_weights()]
        if isinstance(layer, _WITH_ACTIVATION):
            linear = _copy_layer(layer, weights, activation="linear")
            call = lambda *tensors, **keywords: activation(round_values(linear(*tensors, **keywords)))  # noqa: E731
        else:
            call = _copy_layer(layer, weights) if weights else layer
        name = getattr(activation, "__name__", type(layer).__name__.lower())

        def call_and_round(*tensors, **keywords):
            # Constants of operations are arrays; what layers compute is not.
            tensors, keywords = tf.nest.map_structure(
                lambda value: _round_kernel(value, weight_bits, stretches) if isinstance(value, np.ndarray) else value,
                (tensors, keywords),
            )
            return tf.nest.map_structure(
                lambda values: round_values(tf.convert_to_tensor(values), name), call(*tensors, **keywords)
            )

        return call_and_round

    tensors = [round_values(tf.constant(array)) for array in inputs]
    return [output.numpy() for output in tf.nest.flatten(graph.replay(model, tensors, replace))]


def disturb(model: keras.Model, inputs: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Runs a quantized model with one value in ten moved to the code above or below, wherever it quantizes.

    So do runtimes, whose kernels round a little differently: none of them more often than that.

    Args:
      model: Quantized model.
      inputs: One array [count, ...] for each input.
      seed: Seed of which values move.

    Returns:
      Outputs, each [count, ...], in the order of `tf.nest.flatten`.
    """
    generator = np.random.default_rng(seed)

    def replace(layer):
        if not isinstance(layer, ActivationQuantizer):
            return layer

        def call(values, **_):
            signs = generator.choice([-1, 0, 1], values.shape, p=[_MOVED_SHARE, 1 - 2 * _MOVED_SHARE, _MOVED_SHARE])
            moves = signs.astype("float32") * _MOVED_CODES[layer.bits] * layer.scale()
            rounded = layer(values)
            # Divisors, which differ from zero, do so in runtimes too.
            return layer(tf.where((rounded != 0) & (rounded + moves == 0), rounded, rounded + moves))

        return call

    outputs: Any = graph.replay(model, [tf.constant(array) for array in inputs], replace)
    return [output.numpy() for output in tf.nest.flatten(outputs)]


def _copy_layer(layer, weights, **changes):
    copy = graph.copy_layer(layer, weights, **changes)

    def call(*tensors, **keywords):
        copy(*tensors, **keywords)  # it has its weights only after the first call
        return copy(*tensors, **keywords)

    return call


def _round_kernel(weight, bits, stretches):
    if weight.ndim < 2 or not np.any(weight):
        return weight
    stretch = 1.0 if stretches is None else stretches.uniform(1.0, _LARGEST_STRETCH)
    step = stretch * np.max(np.abs(weight)) / (2 ** (bits - 1) - 1)
    return np.round(weight / step) * step
