"""Activations on the calibration images, as methods see them: extremes and histograms."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tf_repvgg.quantization.ptq.network import Network

_BINS = 2048


class Histogram(NamedTuple):
    """Counts of the values of one tensor.

    Attributes:
      counts: Number of values in each bin, [bins].
      edges: Edges of the bins in ascending order, [bins + 1].
    """

    counts: np.ndarray
    edges: np.ndarray


def measure_extremes(network: Network) -> dict[str, tuple[float, float]]:
    """{name in `Network.free_ranges`: (smallest, largest) value on the calibration images}."""
    return find_extremes(network.compute_activations())


def find_extremes(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """{name: (smallest, largest) value} of the named values in all batches."""
    extremes: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, values in batch.items():
            minimum, maximum = extremes.get(name, (np.inf, -np.inf))
            extremes[name] = min(minimum, float(values.min())), max(maximum, float(values.max()))
    return extremes


def collect_histograms(network: Network) -> dict[str, Histogram]:
    """{name in `Network.free_ranges`: histogram of the values on all calibration images}."""
    edges = {
        name: np.linspace(low, max(high, low + 1e-12), _BINS + 1)
        for name, (low, high) in measure_extremes(network).items()
    }
    counts = {name: np.zeros(_BINS, np.int64) for name in edges}
    for activations in network.compute_activations():
        for name, values in activations.items():
            counts[name] += np.histogram(values, _BINS, (edges[name][0], edges[name][-1]))[0]
    return {name: Histogram(counts[name], edges[name]) for name in edges}
