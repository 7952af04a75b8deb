"""Codebooks without training: k-means on kernels, weighted by the second moment of each layer's input."""

import numpy as np

from tf_repvgg.quantization.k_means import k_means
from tf_repvgg.quantization.ptq.methods.min_max import set_ranges_min_max
from tf_repvgg.quantization.ptq.network import Network, spread_over_kernel
from tf_repvgg.quantization.ptq.walk import Walk
from tf_repvgg.quantization.uniform import LARGEST_CODE, QuantizedKernel, raise_scale


def codebook(network: Network) -> None:
    """Sets every kernel to a few int8 codes; sets the activation ranges by min-max unless they are set.

    If a weight multiplies x, its error e costs e^2 E[x^2]: squared errors are weighted by E[x^2] per input channel.
    """
    if not network.has_ranges:
        network.set_ranges(set_ranges_min_max)
    layers = [network.quantized.get_layer(name) for name in network.layers if not network.is_shared(name)]
    walk = Walk(network.calibration, network.quantized, [layer.input for layer in layers])
    for name in network.show_progress(network.layers, "codebooks"):
        kernel = network.kernel(name)
        inputs = None if network.is_shared(name) else walk.compute(network.quantized.get_layer(name).input)
        importance = compute_importance(inputs, kernel.shape)
        network.set_kernel(
            name,
            cluster_kernel(
                kernel, importance, network.clusters[name], network.per_channel[name], network.min_scale(name)
            ),
        )


def compute_importance(inputs: np.ndarray | None, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """E[x^2] of the factor x of each weight.

    Args:
      inputs: Inputs [images, ..., channels] of the layer; None for a layer that is called more than once.
      kernel_shape: Shape of its kernel.

    Returns:
      Array [inputs, outputs], either of which may be 1.
    """
    if inputs is None:
        return np.ones([1, 1], np.float32)
    moment = np.mean(np.square(inputs), axis=tuple(range(inputs.ndim - 1)))
    return spread_over_kernel(moment, kernel_shape)


def cluster_kernel(
    kernel: np.ndarray,
    importance: np.ndarray,
    number_of_clusters: int,
    per_channel: bool,
    min_scale: float | np.ndarray = 0.0,
) -> QuantizedKernel:
    """Replaces the weights of a kernel by a few int8 codes, by weighted k-means.

    Args:
      kernel: Float kernel [..., output channels].
      importance: Weight of each squared error, as `compute_importance` returns it.
      number_of_clusters: Number of centroids of a codebook.
      per_channel: Whether each output channel has a codebook and a scale of its own.
      min_scale: Smallest scale allowed: a number, or one for each output channel.
    """
    columns = kernel.shape[-1] if per_channel else 1
    values, weights = (array.reshape(-1, columns) for array in (kernel, np.broadcast_to(importance, kernel.shape)))
    books = [k_means(values[:, column], weights[:, column], number_of_clusters) for column in range(columns)]
    return _round_to_books(kernel, books, min_scale)


def _round_to_books(kernel, books, min_scale):
    """Codes of the nearest centroid; centroids are int8 codes of a scale that gives the largest of them code 127."""
    largest = np.array([np.max(np.abs(book)) for book in books])
    scale = np.where(largest > 0, largest, 1.0) / LARGEST_CODE
    scale = raise_scale(scale, min_scale)
    flat = kernel.reshape(-1, len(books))
    codes = np.empty(flat.shape, np.int8)
    for column, book in enumerate(books):
        grid = np.unique(np.round(book / scale[column]).astype(np.int8))
        borders = (grid[1:].astype(np.float32) + grid[:-1]) / 2 * scale[column]
        codes[:, column] = grid[np.searchsorted(borders, flat[:, column])]
    return QuantizedKernel(codes.reshape(kernel.shape), scale)
