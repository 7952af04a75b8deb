"""AdaQuant (Hubara 2020, arXiv:2006.10518): learning weights, scales and biases together, layer by layer."""

import numpy as np
import tensorflow as tf

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.reconstruction import Rounding, reconstruct
from tf_repvgg.quantization.uniform import QuantizedKernel

# In steps of the grid for weights, in shares of the scale for scales.
_LEARNING_RATE = 1e-2


def adaquant(network: Network) -> None:
    """Moves weights to any codes, and scales, so that each layer reproduces the float layer's outputs (equation 2)."""
    reconstruct(network, _rounding, _LEARNING_RATE, "AdaQuant")


def _rounding(network, name, bias):
    start = network.kernels[name].scale
    largest = 2 ** (network.bits[name] - 1) - 1
    # Weights in steps of the grid they start on: one learning rate serves all layers.
    weights = tf.Variable(network.kernel(name) / start)
    log_scale = tf.Variable(tf.zeros_like(start))

    def codes():
        exact = tf.clip_by_value(weights * tf.exp(-log_scale), -float(largest), float(largest))
        return exact + tf.stop_gradient(tf.round(exact) - exact)

    def scale():
        return np.maximum(start * np.exp(log_scale.numpy()), network.min_scale(name).max()).astype(np.float32)

    def result():
        return QuantizedKernel(codes().numpy().astype(np.int8), scale()), bias.numpy()

    return Rounding([weights, log_scale], lambda: codes() * start * tf.exp(log_scale), lambda _: 0.0, result)
