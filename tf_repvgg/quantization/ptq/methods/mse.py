"""MSE: ranges with the smallest mean squared error of clipping and rounding together (OMSE, arXiv:1902.06822)."""

import numpy as np

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import Histogram, collect_histograms
from tf_repvgg.quantization.uniform import QuantizedKernel, largest_magnitude, round_to_grid

_WEIGHT_SHARES = np.linspace(1, 0.1, 91)
_ACTIVATION_SHARES = np.linspace(1, 0.3, 36)


def mse(network: Network) -> None:
    """Sets all activation ranges, unless a method before has a rule for them, and all kernels, each by a search."""
    network.set_ranges(set_ranges_mse)
    set_kernels_mse(network)


def set_kernels_mse(network: Network) -> None:
    """Sets all kernels, each scale by a search of its own."""
    for name in network.layers:
        network.set_kernel(
            name,
            search_grid(network.kernel(name), network.bits[name], network.per_channel[name], network.min_scale(name)),
        )


def set_ranges_mse(network: Network) -> None:
    """Sets all activation ranges, each by a search of its own."""
    for name, histogram in collect_histograms(network).items():
        network.quantizers[name].set_range(*search_range(histogram, network.options.activation_bits))


def search_grid(
    kernel: np.ndarray, bits: int, per_channel: bool, min_scale: float | np.ndarray = 0.0
) -> QuantizedKernel:
    """Rounds a kernel to the uniform grid with the smallest squared error.

    Candidates are grids whose largest code stands for 10 to 100 % of the largest weight.

    Args:
      kernel: Float kernel [..., output channels].
      bits: Width of the codes, 2 to 8.
      per_channel: Whether each output channel has a scale of its own.
      min_scale: Smallest scale allowed: a number, or one for each output channel.

    Raises:
      ValueError: If `bits` is out of range or the kernel is not finite.
    """
    largest = largest_magnitude(kernel, per_channel)
    axes = tuple(range(np.ndim(kernel) - 1)) if per_channel else None
    best, best_share = np.full(largest.shape, np.inf), np.ones(largest.shape, np.float32)
    for share in _WEIGHT_SHARES:
        rounded = round_to_grid(kernel, share * largest, bits, min_scale).dequantize()
        error = np.sum(np.square(rounded - kernel), axis=axes).reshape(-1)
        best_share = np.where(error < best, share, best_share)
        best = np.minimum(error, best)
    return round_to_grid(kernel, best_share * largest, bits, min_scale)


def search_range(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """The range with the smallest squared error on a histogram; first moves the end that is farther from zero."""
    values = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    best = [min(float(histogram.edges[0]), 0.0), max(float(histogram.edges[-1]), 0.0)]
    for end in sorted((0, 1), key=lambda end: -abs(best[end])):
        candidates = [[*best[:end], share * best[end], *best[end + 1 :]] for share in _ACTIVATION_SHARES]
        best = min(candidates, key=lambda ends: _error(values, histogram.counts, 2**bits - 1, *ends))
    return best[0], best[1]


def _error(values, counts, largest_code, minimum, maximum):
    scale = (maximum - minimum) / largest_code
    if scale <= 0:
        return float(np.sum(counts * np.square(values)))
    zero_code = np.round(-minimum / scale)
    codes = np.clip(np.round(values / scale) + zero_code, 0, largest_code)
    return float(np.sum(counts * np.square((codes - zero_code) * scale - values)))
