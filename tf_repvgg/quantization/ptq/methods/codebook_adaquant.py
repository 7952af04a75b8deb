"""AdaQuant (Hubara 2020, arXiv:2006.10518) on codebooks: learning weights, centroids and biases, layer by layer."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization import codebooks
from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.methods.codebook import codebook
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.reconstruction import Rounding, reconstruct
from tf_repvgg.quantization.uniform import QuantizedKernel, at_least

# Of weights and centroids, in mean distances between neighbouring centroids; and of biases.
_LEARNING_RATE = 1e-2


def codebook_adaquant(network: Network) -> None:
    """Moves weights to any centroid, and centroids, so that each layer reproduces the float layer's outputs.

    Equation 2 of the paper, with a codebook in place of the uniform grid: a weight's gradient passes straight through
    to it, a centroid's is the mean of those of its weights. Starts from `codebook`; then `bias_tune`, as in the paper.
    """
    codebook(network)
    rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, network.options.iterations)
    reconstruct(network, _rounding, rate, "codebooks by AdaQuant")
    bias_tune(network)


def _rounding(network, name, bias):
    kernel, start = network.kernel(name), network.kernels[name]
    flat = start.dequantize().reshape(-1, kernel.shape[-1])
    books = codebooks.initial_centroids(flat, network.states[name], len(start.scale) > 1).numpy()  # its few values
    # Everything in mean distances between neighbours: one learning rate serves all layers, and numbers of states.
    unit = (books[:, -1] - books[:, 0]) / (network.states[name] - 1)
    unit = np.where(unit > 0, unit, np.max(unit) or 1.0).astype(np.float32)  # a dead channel needs some too
    weights = tf.Variable(kernel.reshape(-1, kernel.shape[-1]) / unit)
    centroids = tf.Variable(books / unit[:, np.newaxis])
    moves = {"is_frozen": tf.constant(False), "assignments": tf.zeros_like(weights, tf.uint8), "aggregation": "mean"}

    def grid():
        # The optimizer may have moved one centroid past another.
        return codebooks.on_grid(tf.sort(centroids, axis=-1))

    def quantized():
        return tf.reshape(codebooks.quantize(weights, grid(), **moves), kernel.shape)

    def result():
        scale = codebooks.grid_scale(centroids).numpy()
        codes = np.round(quantized().numpy() / scale).astype(np.int8)
        return QuantizedKernel(codes, at_least(scale * unit, network.min_scale(name))), bias.numpy()

    return Rounding([weights, centroids], lambda: quantized() * unit, lambda _: 0.0, result)
