"""Learning the rounding of each layer from the outputs that it should compute: the core of AdaRound and AdaQuant."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.ptq.looks import is_look_due
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.walk import Walk
from tf_repvgg.quantization.ptq.windows import Windows
from tf_repvgg.quantization.quantized_layers import apply_kernel
from tf_repvgg.quantization.uniform import QuantizedKernel

_EVALUATION_BATCH = 64
# A layer is reported as overfitted where the images that it learned from keep so much less of the initial error than
# others do.
_OVERFITTED = 0.8


class Rounding(NamedTuple):
    """A kernel that is being rounded.

    Attributes:
      variables: Variables that the optimizer changes, beside the bias.
      soft_kernel: () -> kernel during training, differentiable.
      penalty: Progress from 0 to 1 -> number that is added to the loss.
      result: () -> (quantized kernel, bias).
    """

    variables: list[tf.Variable]
    soft_kernel: Callable[[], tf.Tensor]
    penalty: Callable[[Any], Any]
    result: Callable[[], tuple[QuantizedKernel, np.ndarray]]


def reconstruct(
    network: Network,
    make_rounding: Callable[[Network, str, tf.Variable], Rounding],
    learning_rate: Any,
    description: str,
) -> None:
    """Improves kernels and biases layer by layer: inputs of the quantized prefix, outputs of the float layer.

    Starts from the kernels and ranges that are set, by default those of `mse`. Of each layer it keeps the best of a few
    looks, the start included, by mean squared error over a fifth of the calibration images, which it does not learn
    from. The notes name layers that serve the others much better.

    Args:
      network: Network to change.
      make_rounding: (network, layer name, bias variable) -> rounding of the layer's kernel.
      learning_rate: Learning rate of Adam: a number or a schedule.
      description: Name of the method in progress bars and notes.
    """
    if not network.is_complete:
        mse(network)
    generator = np.random.default_rng(network.options.seed)
    learned, held_out = network.calibration.split(network.options.seed)
    layers = {name: network.quantized.get_layer(name) for name in network.layers if not network.is_shared(name)}
    inputs_walk = Walk(network.calibration, network.quantized, [layer.input for layer in layers.values()])
    expected_walk = Walk(network.calibration, network.float, [network.layers[name].output for name in layers])
    overfitted = []
    for name in network.show_progress(network.layers, description):
        if name not in layers:
            network.notes.append(f"{description}: layer {name} is called more than once and keeps its initial kernel")
            continue
        layer = layers[name]
        inputs = inputs_walk.compute(layer.input)
        expected = expected_walk.compute(network.layers[name].output)

        def measure(result, images, layer=layer, inputs=inputs, expected=expected):
            kernel, bias = result
            return compute_layer_error(layer, kernel, bias, inputs[images], expected[images])

        start = network.kernels[name], network.get_quantized_bias(name)
        bias = tf.Variable(start[1], trainable=layer.use_bias)
        rounding = make_rounding(network, name, bias)
        windows = Windows(layer, inputs, expected, learned, generator)
        results = [start]
        variance = float(np.var(expected))
        for _ in _train(layer, rounding, bias, windows, variance, learning_rate, network.options.iterations):
            results.append(rounding.result())
        errors = [measure(result, held_out) for result in results]
        best = errors.index(min(errors))
        if best > 0:  # not the start, which is set
            network.set_kernel(name, *results[best])
            before, after = (measure(result, learned[: len(held_out)]) for result in (start, results[best]))
            if after * errors[0] < _OVERFITTED * errors[best] * before:
                overfitted.append(name)
    if overfitted:
        network.notes.append(
            f"{description}: layers that serve the images they learned from better than others, which more calibration "
            f"images, of more classes, would cure: {', '.join(overfitted)}"
        )


def compute_layer_error(
    layer: keras.layers.Layer, kernel: QuantizedKernel, bias: np.ndarray, inputs: np.ndarray, expected: np.ndarray
) -> float:
    """Mean squared error of a layer's outputs, its activation included, over all calibration images.

    Args:
      layer: Quantized layer; its own kernel and bias are not used.
      kernel: Codes and scale.
      bias: Bias [output channels].
      inputs: Inputs [images, ...] of the layer.
      expected: Outputs [images, ...] of the float layer.
    """
    weights, total = kernel.dequantize(), 0.0
    for start in range(0, len(inputs), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        outputs = layer.activation(apply_kernel(layer, inputs[part], weights) + bias)
        total += float(tf.reduce_sum(tf.math.squared_difference(outputs, expected[part])))
    return total / expected.size


def _train(layer, rounding, bias, windows, variance, learning_rate, iterations):
    """Trains a layer's rounding, and yields whenever a look is due."""
    optimizer = keras.optimizers.Adam(learning_rate)
    variables = rounding.variables + ([bias] if layer.use_bias else [])
    optimizer.build(variables)

    # Errors relative to the variance of the outputs, so that one learning rate and one penalty suit all layers.
    unit = variance or 1.0

    @tf.function
    def step(x, y, progress):
        with tf.GradientTape() as tape:
            outputs = layer.activation(apply_kernel(windows.layer, x, rounding.soft_kernel()) + bias)
            loss = tf.reduce_mean(tf.math.squared_difference(outputs, y)) / unit + rounding.penalty(progress)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for iteration in range(iterations):
        step(*map(tf.constant, windows.draw()), tf.constant(iteration / iterations))
        if is_look_due(iteration, iterations):
            yield
