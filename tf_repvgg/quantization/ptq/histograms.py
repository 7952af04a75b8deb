"""Histograms of activations, for methods that look at more than the extremes."""

from typing import NamedTuple

import numpy as np

from tf_repvgg.quantization.ptq.min_max import extremes
from tf_repvgg.quantization.ptq.network import Network

_BINS = 2048


class Histogram(NamedTuple):
    """How often values occur: counts of shape [bins], edges of shape [bins + 1]."""

    counts: np.ndarray
    edges: np.ndarray


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
