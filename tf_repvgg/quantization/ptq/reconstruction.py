"""Learning a layer's rounding from what it should compute: what AdaRound and AdaQuant share."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.quantized_layers import linear
from tf_repvgg.quantization.uniform import QuantizedKernel

# Images of a step: fewer where each has many output pixels, as these are what a kernel learns from.
_BATCH, _SMALLEST_BATCH, _PIXELS = 32, 8, 1024
_EVALUATED = 64
# How often a layer's rounding so far is looked at, for the best of them to be taken.
_LOOKS = 4


class Rounding(NamedTuple):
    """How a kernel is being rounded.

    Attributes:
      variables: what the optimizer changes.
      soft_kernel: () -> the kernel during training, differentiable.
      penalty: progress from 0 to 1 -> a number added to the loss.
      result: () -> (the quantized kernel, the bias).
    """

    variables: list
    soft_kernel: Callable
    penalty: Callable
    result: Callable


def reconstruct(network: Network, make_rounding: Callable, learning_rate, description: str) -> None:
    """Improves kernels and biases layer by layer: inputs of the quantized prefix, outputs of the float layer.

    Starts from the kernels and ranges that are set, by default those of `mse`. Of each layer the best of a few
    looks is taken, the start included, by mean squared error over all calibration images.

    Args:
      make_rounding: (network, name, bias variable) -> `Rounding`.
      learning_rate: of Adam: a number or a schedule.
      description: of the progress bar.
    """
    if not network.is_complete:
        mse(network)
    generator = np.random.default_rng(network.options.seed)
    for name in network.progress(network.layers, description):
        if network.is_shared(name):
            network.notes.append(f"{description}: {name} is called more than once and keeps its start")
            continue
        inputs, expected = network.inputs_of(name), network.outputs_of(name)
        layer = network.quantized.get_layer(name)
        start = network.kernels[name], network.quantized_bias(name)
        bias = tf.Variable(start[1], trainable=layer.use_bias)
        rounding = make_rounding(network, name, bias)
        looked_at = [start]
        steps = _optimized(
            layer, rounding, bias, inputs, expected, learning_rate, network.options.iterations, generator
        )
        looked_at += [rounding.result() for _ in steps]
        best = min(looked_at, key=lambda result: objective(layer, *result, inputs, expected))
        if best is not start:
            network.set_kernel(name, *best)


def objective(layer, quantized: QuantizedKernel, bias, inputs, expected) -> float:
    """Mean squared error of the layer's output, its activation included, over all calibration images."""
    kernel, total = quantized.dequantize(), 0.0
    for start in range(0, len(inputs), _EVALUATED):
        part = slice(start, start + _EVALUATED)
        found = layer.activation(linear(layer, inputs[part], kernel) + bias)
        total += float(tf.reduce_sum(tf.math.squared_difference(found, expected[part])))
    return total / expected.size


def _optimized(layer, rounding, bias, inputs, expected, learning_rate, iterations, generator):
    """Trains a layer's rounding, and yields whenever it should be looked at, after the last step too."""
    optimizer = keras.optimizers.Adam(learning_rate)
    variables = rounding.variables + ([bias] if layer.use_bias else [])
    optimizer.build(variables)
    # Errors in units of the output's own spread, so that one learning rate and one penalty serve all layers.
    unit = float(np.var(expected)) or 1.0

    @tf.function
    def step(x, y, progress):
        with tf.GradientTape() as tape:
            found = layer.activation(linear(layer, x, rounding.soft_kernel()) + bias)
            loss = tf.reduce_mean(tf.math.squared_difference(found, y)) / unit + rounding.penalty(progress)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    pixels = int(np.prod(expected.shape[1:-1]))
    batch = min(max(_PIXELS // pixels, _SMALLEST_BATCH), _BATCH, len(inputs))
    for iteration in range(iterations):
        chosen = generator.integers(0, len(inputs), batch)
        step(tf.constant(inputs[chosen]), tf.constant(expected[chosen]), tf.constant(iteration / iterations))
        if (iteration + 1) * _LOOKS // iterations > iteration * _LOOKS // iterations:
            yield
