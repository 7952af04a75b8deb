"""What methods see of activations on the calibration images: extremes and histograms."""

from typing import NamedTuple

import numpy as np

from tf_repvgg.quantization.ptq.network import Network

_BINS = 2048


class Histogram(NamedTuple):
    """How often values occur: counts of shape [bins], edges of shape [bins + 1]."""

    counts: np.ndarray
    edges: np.ndarray


def extremes(network: Network) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each activation on the calibration images."""
    found = dict.fromkeys(network.free_ranges, (np.inf, -np.inf))
    for activations in network.activations():
        for name, values in activations.items():
            minimum, maximum = found[name]
            found[name] = min(minimum, float(values.min())), max(maximum, float(values.max()))
    return found


def histograms(network: Network) -> dict[str, Histogram]:
    """One histogram for each activation range that is to be set, over all calibration images."""
    edges = {
        name: np.linspace(low, max(high, low + 1e-12), _BINS + 1) for name, (low, high) in extremes(network).items()
    }
    counts = {name: np.zeros(_BINS, np.int64) for name in edges}
    for activations in network.activations():
        for name, values in activations.items():
            counts[name] += np.histogram(values, _BINS, (edges[name][0], edges[name][-1]))[0]
    return {name: Histogram(counts[name], edges[name]) for name in edges}
