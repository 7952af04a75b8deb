"""Bias tuning (Hubara 2020, arXiv:2006.10518, section 3.4): all biases at once, by the float network's outputs."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.ptq.looks import is_look_due
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.network import Network

# Images of a step: fewer where they have many pixels, because biases learn from pixels.
_BATCH, _SMALLEST_BATCH, _PIXELS = 32, 8, 2**19
# In steps of the grid that a layer's output is rounded to; falls to zero.
_LEARNING_RATE = 0.1
# A step runs the whole network forward and backward, so there are fewer of them than each layer gets.
_SHARE_OF_ITERATIONS = 0.25


def bias_tune(network: Network) -> None:
    """Moves the biases of the quantized network so that its outputs come close to the float network's.

    Minimizes the mean squared error of all outputs, which needs no labels; kernels and ranges are frozen. It keeps the
    best of a few looks, the start included, by the error on a fifth of the calibration images, which it does not learn
    from.
    """
    if not network.is_complete:
        mse(network)
    learned, held_out = network.calibration.split(network.options.seed)
    judges, expected = network.calibration.take(held_out), [outputs[held_out] for outputs in network.reference_outputs]

    def measure_error():
        actual = judges.compute(network.quantized, network.quantized.outputs)
        return float(np.mean([np.mean(np.square(y - x)) for x, y in zip(actual, expected, strict=True)]))

    start = measure_error()
    best_error, best = start, network.get_quantized_biases()
    for _ in _train(network, learned):
        if (error := measure_error()) < best_error:
            best_error, best = error, network.get_quantized_biases()
    for name, bias in best.items():
        network.set_bias(name, bias)
    if not best_error < start:
        network.notes.append("bias tuning was undone: it did not reduce the error of the outputs")


def _train(network, images):
    """Trains the biases on the images of these indices, and yields whenever a look is due."""
    layers = [network.quantized.get_layer(name) for name in network.get_quantized_biases()]
    if not layers:
        return
    iterations = max(1, round(_SHARE_OF_ITERATIONS * network.options.iterations))
    biases = [layer.bias for layer in layers]
    starts, scales = [bias.numpy() for bias in biases], [_output_scale(layer) for layer in layers]
    offsets = [tf.Variable(tf.zeros_like(bias)) for bias in biases]  # in steps of the output's grid
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, iterations))
    optimizer.build(offsets)
    variances = [float(np.var(outputs)) or 1.0 for outputs in network.reference_outputs]

    @tf.function
    def step(inputs, expected):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(biases)
            actual = tf.nest.flatten(network.quantized(graph.pack_inputs(network.quantized, inputs), training=False))
            errors = [
                tf.reduce_mean(tf.math.squared_difference(*pair)) / variance
                for *pair, variance in zip(actual, expected, variances, strict=True)
            ]
            loss = tf.add_n(errors)
        gradients = tape.gradient(loss, biases, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        optimizer.apply_gradients(
            (gradient * scale, offset) for gradient, scale, offset in zip(gradients, scales, offsets, strict=True)
        )
        for bias, start, scale, offset in zip(biases, starts, scales, offsets, strict=True):
            bias.assign(start + scale * offset)

    calibration = network.calibration
    pixels = max(int(np.prod(values.shape[1:-1])) for values in calibration.inputs)
    fitting = min(max(_PIXELS // pixels, _SMALLEST_BATCH), _BATCH, len(images))
    batch = network.quantized.inputs[0].shape[0] or fitting
    generator = np.random.default_rng(network.options.seed)
    for iteration in network.show_progress(range(iterations), "bias tuning", unit="step"):
        indices = images[generator.integers(0, len(images), batch)]
        step(
            [tf.constant(values[indices]) for values in calibration.inputs],
            [tf.constant(values[indices]) for values in network.reference_outputs],
        )
        if is_look_due(iteration, iterations):
            yield


def _output_scale(layer):
    """The step of the grid that a layer's output, its activation included, is rounded to."""
    while not isinstance(layer, ActivationQuantizer):
        layer = layer.outbound_nodes[0].layer
    return layer.scale()
