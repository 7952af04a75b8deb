"""AdaRound (Nagel 2020, arXiv:2004.10568): learning for each weight whether to round it up or down."""

import numpy as np
import tensorflow as tf

from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.reconstruction import Rounding, reconstruct
from tf_repvgg.quantization.uniform import QuantizedKernel, largest_code

# The stretch of the rectified sigmoid, and weight and exponent of the regularizer (equations 23 to 25).
_ZETA, _GAMMA = 1.1, -0.1
_PENALTY = 1e-2  # relative to errors in units of the output's variance
_BETA = (20.0, 2.0)
_WARM_UP = 0.2
_LEARNING_RATE = 1e-2


def adaround(network: Network) -> None:
    """Rounds every kernel to the neighbouring codes that best reproduce the float layer's outputs; then `bias_tune`."""
    reconstruct(network, _make_rounding, _LEARNING_RATE, "AdaRound")
    bias_tune(network)


def _make_rounding(network, name, bias):
    scale = network.kernels[name].scale
    largest = largest_code(network.bits[name])
    exact = np.clip(network.kernel(name) / scale, -largest, largest)
    floor = np.floor(exact)
    share = np.clip((exact - floor - _GAMMA) / (_ZETA - _GAMMA), 1e-4, 1 - 1e-4)
    v = tf.Variable(np.log(share / (1 - share)).astype(np.float32))

    def up():
        return tf.clip_by_value(tf.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0, 1)

    def soft_kernel():
        return tf.clip_by_value(floor + up(), -largest, largest) * scale

    def penalty(progress):
        annealed = tf.clip_by_value((progress - _WARM_UP) / (1 - _WARM_UP), 0, 1)
        beta = _BETA[0] + (_BETA[1] - _BETA[0]) * annealed
        undecided = tf.reduce_mean(1 - tf.abs(2 * up() - 1) ** beta)
        return tf.where(progress < _WARM_UP, 0.0, _PENALTY * undecided)

    def result():
        codes = np.clip(floor + (up().numpy() >= 0.5), -largest, largest).astype(np.int8)
        return QuantizedKernel(codes, scale), bias.numpy()

    return Rounding([v], soft_kernel, penalty, result)
