"""AdaQuant (Hubara 2020, arXiv:2006.10518) on codebooks: learning weights, centroids and biases, layer by layer."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization import codebooks
from tf_repvgg.quantization.ptq.methods.bias_tune import bias_tune
from tf_repvgg.quantization.ptq.methods.codebook import codebook
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.reconstruction import Rounding, reconstruct
from tf_repvgg.quantization.uniform import QuantizedKernel, raise_scale

# Of weights and centroids, in mean distances between neighbouring centroids; and of biases.
_LEARNING_RATE = 1e-2


def codebook_adaquant(network: Network) -> None:
    """Moves weights to any centroid, and centroids, so that each layer reproduces the float layer's outputs.

    Equation 2 of the paper, with a codebook in place of the uniform grid: a weight's gradient passes straight through
    to it; a centroid's gradient is the mean of its weights' gradients. Starts from `codebook`; then `bias_tune`, as in
    the paper.
    """
    codebook(network)
    rate = keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, network.options.iterations)
    reconstruct(network, _make_rounding, rate, "codebooks by AdaQuant")
    bias_tune(network)


def _make_rounding(network, name, bias):
    kernel, start = network.kernel(name), network.kernels[name]
    flat, clusters = start.dequantize().reshape(-1, kernel.shape[-1]), network.clusters[name]
    # The start has so few distinct values that they are the centroids.
    books = codebooks.initial_centroids(flat, clusters, len(start.scale) > 1).numpy()
    # In mean distances between neighbouring centroids, one learning rate suits all layers and numbers of clusters.
    unit = (books[:, -1] - books[:, 0]) / (clusters - 1)
    unit = np.where(unit > 0, unit, np.max(unit) or 1.0).astype(np.float32)  # any unit serves a dead channel
    weights = tf.Variable(kernel.reshape(-1, kernel.shape[-1]) / unit)
    centroids = tf.Variable(books / unit[:, np.newaxis])
    options = {"is_frozen": tf.constant(False), "assignments": tf.zeros_like(weights, tf.uint8), "aggregation": "mean"}

    def grid():
        # The optimizer may have moved one centroid past another.
        return codebooks.round_centroids(tf.sort(centroids, axis=-1))

    def quantize():
        return tf.reshape(codebooks.quantize(weights, grid(), **options), kernel.shape)

    def result():
        scale = codebooks.grid_scale(centroids).numpy()
        codes = np.round(quantize().numpy() / scale).astype(np.int8)
        return QuantizedKernel(codes, raise_scale(scale * unit, network.min_scale(name))), bias.numpy()

    return Rounding([weights, centroids], lambda: quantize() * unit, lambda _: 0.0, result)
