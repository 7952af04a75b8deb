"""Percentile: ranges that leave out a small share of the values, which are clipped."""

import numpy as np

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import Histogram, collect_histograms
from tf_repvgg.quantization.uniform import round_to_grid


def percentile(network: Network) -> None:
    """Sets all activation ranges and all kernels to hold `Options.percentile` of the values.

    An activation range leaves out half of the remaining values at either end; a kernel's grid, those of the largest
    magnitude. Ranges stay those of a method before that has a rule for them.
    """
    network.set_ranges(set_ranges_percentile)
    share = network.options.percentile / 100
    for name in network.layers:
        kernel = network.kernel(name)
        axes = tuple(range(kernel.ndim - 1)) if network.per_channel[name] else None
        largest = np.quantile(np.abs(kernel), share, axis=axes).reshape(-1)
        network.set_kernel(name, round_to_grid(kernel, largest, network.bits[name], network.min_scale(name)))


def set_ranges_percentile(network: Network) -> None:
    """Sets all activation ranges to hold `Options.percentile` of the values."""
    for name, histogram in collect_histograms(network).items():
        network.quantizers[name].set_range(*find_central_range(histogram, network.options.percentile / 100))


def find_central_range(histogram: Histogram, share: float) -> tuple[float, float]:
    """The range that holds a share, from 0 to 1, of the values; moves in only an end that few values reach."""
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]) / np.sum(histogram.counts)
    outside = (1 - share) / 2
    low = histogram.edges[np.searchsorted(cumulative, outside, side="right") - 1]
    high = histogram.edges[np.searchsorted(cumulative, 1 - outside, side="left")]
    return float(low), float(high)
