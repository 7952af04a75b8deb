"""Codebooks without training: k-means on kernels, weighted by the second moment of each layer's input."""

import numpy as np

from tf_repvgg.quantization.k_means import k_means
from tf_repvgg.quantization.ptq.methods.min_max import ranges_min_max
from tf_repvgg.quantization.ptq.network import Network, by_input_channel
from tf_repvgg.quantization.uniform import LARGEST_CODE, QuantizedKernel, at_least


def codebook(network: Network) -> None:
    """Sets every kernel to a few values, on int8 codes; and the activation ranges, by min-max, unless they are set.

    An error e of a weight that multiplies x costs e^2 E[x^2]: squared errors are weighted by that, per input channel.
    """
    if not network.has_ranges:
        ranges_min_max(network)
    for name in network.progress(network.layers, "codebooks"):
        states = network.states[name]
        kernel = network.kernel(name)
        importance = np.broadcast_to(_second_moment(network, name, kernel.shape), kernel.shape)
        columns = [kernel.shape[-1], 1][not network.per_channel]
        values, weights = (array.reshape(-1, columns) for array in (kernel, importance))
        books = [k_means(values[:, c], weights[:, c], states) for c in range(columns)]
        network.set_kernel(name, _on_grid(kernel, books, network.min_scale(name)))


def _second_moment(network, name, shape):
    """E[x^2] of what each weight multiplies; of shape [inputs, outputs], either of which may be 1."""
    if network.is_shared(name):
        return np.ones([1, 1], np.float32)
    inputs = network.inputs_of(name)
    moment = np.mean(np.square(inputs), axis=tuple(range(inputs.ndim - 1)))
    return by_input_channel(moment, shape)


def _on_grid(kernel, books, min_scale):
    """Codes of the nearest centroid, centroids rounded to int8 codes of a scale that spends all 127 on the largest."""
    largest = np.array([np.max(np.abs(book)) for book in books])
    scale = np.where(largest > 0, largest, 1.0) / LARGEST_CODE
    scale = at_least(scale, min_scale)
    flat = kernel.reshape(-1, len(books))
    codes = np.empty(flat.shape, np.int8)
    for column, book in enumerate(books):
        grid = np.unique(np.round(book / scale[column]).astype(np.int8))
        borders = (grid[1:].astype(np.float32) + grid[:-1]) / 2 * scale[column]
        codes[:, column] = grid[np.searchsorted(borders, flat[:, column])]
    return QuantizedKernel(codes.reshape(kernel.shape), scale)
