"""AdaQuant (Hubara 2020, arXiv:2006.10518): learning weights, scales and biases, layer by layer, then all biases."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.reconstruction import Rounding, reconstruct
from tf_repvgg.quantization.uniform import QuantizedKernel, largest_code, raise_scale

# Of weights in steps of the grid, and of biases; scales change at a tenth of it, relative to their size.
_LEARNING_RATE = 1e-2
_SCALE_RATE = 0.1


def adaquant(network: Network) -> None:
    """Moves weights to any codes, and scales, so that each layer reproduces the float layer's outputs (equation 2).

    Then `bias_tune`, as in the paper.
    """
    # The rate falls to zero; otherwise weights would still hop between codes at the end.
    rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, network.options.iterations)
    reconstruct(network, _make_rounding, rate, "AdaQuant")
    bias_tune(network)


def _make_rounding(network, name, bias):
    start = network.kernels[name].scale
    largest = largest_code(network.bits[name])
    # In steps of the initial grid, one learning rate suits all layers.
    weights = tf.Variable(network.kernel(name) / start)
    log_growth = tf.Variable(tf.zeros_like(start))

    def growth():
        return tf.exp(_SCALE_RATE * log_growth)

    def codes():
        exact = tf.clip_by_value(weights / growth(), -float(largest), float(largest))
        return exact + tf.stop_gradient(tf.round(exact) - exact)

    def scale():
        return raise_scale(start * growth().numpy(), network.min_scale(name))

    def result():
        return QuantizedKernel(codes().numpy().astype(np.int8), scale()), bias.numpy()

    return Rounding([weights, log_growth], lambda: codes() * start * growth(), lambda _: 0.0, result)
