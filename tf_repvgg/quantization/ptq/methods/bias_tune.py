"""Bias tuning (Hubara 2020, arXiv:2006.10518, section 3.4): all biases at once, by the float network's outputs."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.activations import ActivationQuantizer
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.network import Network

_BATCH = 32
# In steps of the grid that a layer's output is rounded to; falls to zero.
_LEARNING_RATE = 0.1
# A step runs the whole network, there and back, so there are fewer of them than each layer gets.
_SHARE_OF_ITERATIONS = 0.25
_LOOKS = 4


def bias_tune(network: Network) -> None:
    """Moves the biases of the quantized network so that its outputs come close to the float network's.

    Minimizes the mean squared error of all outputs, which needs no labels; kernels and ranges stay. Of a few looks over
    all calibration images the best is taken, the start included.
    """
    if not network.is_complete:
        mse(network)
    start = network.error()
    best_error, best = start, network.biases()
    for _ in _tuned(network):
        if (error := network.error()) < best_error:
            best_error, best = error, network.biases()
    for name, bias in best.items():
        network.set_bias(name, bias)
    if not best_error < start:
        network.notes.append("bias tuning undone: the outputs' error was no smaller for it")


def _tuned(network):
    """Trains the biases, and yields whenever they should be looked at, after the last step too."""
    layers = [network.quantized.get_layer(name) for name in network.biases()]
    if not layers:
        return
    iterations = max(1, round(_SHARE_OF_ITERATIONS * network.options.iterations))
    biases = [layer.bias for layer in layers]
    starts, steps = [bias.numpy() for bias in biases], [_step_after(layer) for layer in layers]
    moved = [tf.Variable(tf.zeros_like(bias)) for bias in biases]
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, iterations))
    optimizer.build(moved)
    units = [float(np.var(outputs)) or 1.0 for outputs in network.expected]

    @tf.function
    def step(images, *expected):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(biases)
            found = tf.nest.flatten(network.quantized(images, training=False))
            errors = [
                tf.reduce_mean(tf.math.squared_difference(*pair)) / unit
                for *pair, unit in zip(found, expected, units, strict=True)
            ]
            loss = tf.add_n(errors)
        gradients = tape.gradient(loss, biases, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        optimizer.apply_gradients(
            (gradient * one, its) for gradient, one, its in zip(gradients, steps, moved, strict=True)
        )
        for bias, start, one, its in zip(biases, starts, steps, moved, strict=True):
            bias.assign(start + one * its)

    generator = np.random.default_rng(network.options.seed)
    for iteration in network.progress(range(iterations), "bias tuning", unit="step"):
        chosen = generator.integers(0, len(network.images), min(_BATCH, len(network.images)))
        step(*(tf.constant(values[chosen]) for values in (network.images, *network.expected)))
        if (iteration + 1) * _LOOKS // iterations > iteration * _LOOKS // iterations:
            yield


def _step_after(layer):
    """The step of the grid that a layer's output, its activation included, is rounded to."""
    while not isinstance(layer, ActivationQuantizer):
        layer = layer.outbound_nodes[0].layer
    return layer.scale()
