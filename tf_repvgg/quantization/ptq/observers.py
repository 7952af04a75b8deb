"""Activations on the calibration images, as methods see them: extremes, histograms, and histograms of single images."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tf_repvgg.quantization.ptq.network import Network

_BINS = 2048
# Bins of histograms of single images: sign, exponent and 4 bits of the fraction of float32 numbers.
_DROPPED_BITS = 19
_IMAGE_BINS = 2 ** (32 - _DROPPED_BITS)
_SAMPLES = 2**15


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


class ImageHistograms(NamedTuple):
    """Counts of the values of one tensor, for each image by itself.

    Bins are as wide as a sixteenth of an octave of their values, so that they serve an image of any scale.

    Attributes:
      counts: Number of values in each bin, [images, bins].
      values: Value in the middle of each bin, [bins].
      widths: Width of each bin, [bins].
      low: Smallest value on all images.
      high: Largest value on all images.
    """

    counts: np.ndarray
    values: np.ndarray
    widths: np.ndarray
    low: float
    high: float


def collect_image_histograms(network: Network) -> dict[str, ImageHistograms]:
    """{name in `Network.free_ranges`: histograms of the values on each calibration image}, in one pass.

    Of a tensor with more than 32,768 values per image, that many are counted, evenly spaced over pixels and channels;
    the extremes are those of all values.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def observe(batch):
        for name, values in batch.items():
            parts.setdefault(name, []).append(_count_values(values))
        return batch

    extremes = find_extremes(map(observe, network.compute_activations()))
    return {name: _join_histograms(counted, *extremes[name]) for name, counted in parts.items()}


def _count_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bins that hold values, counts [images, those bins]) of a batch."""
    values = np.asarray(values, np.float32).reshape(len(values), -1)
    stride = -(-values.shape[1] // _SAMPLES)
    while math.gcd(stride, values.shape[1]) > 1:  # so that all channels and columns take part
        stride += 1
    # Sign, exponent and the first bits of the fraction of a float32 number are its bin.
    bins = np.ascontiguousarray(values[:, ::stride]).view(np.uint32) >> _DROPPED_BITS
    counts = np.stack([np.bincount(image.astype(np.intp), minlength=_IMAGE_BINS) for image in bins])
    used = np.flatnonzero(counts.any(axis=0))
    return used, counts[:, used].astype(np.uint16)


def _join_histograms(parts, low, high):
    used = np.unique(np.concatenate([bins for bins, _ in parts]))
    counts = np.concatenate([np.zeros([len(part), len(used)], np.float32) for _, part in parts])
    start = 0
    for bins, part in parts:
        counts[start : start + len(part), np.searchsorted(used, bins)] = part
        start += len(part)
    with np.errstate(invalid="ignore"):  # infinities, which no range takes
        edges = [(used.astype(np.uint32) + end << _DROPPED_BITS).view(np.float32).astype(np.float64) for end in (0, 1)]
        middle, width = (edges[0] + edges[1]) / 2, np.abs(edges[1] - edges[0])
    is_zero = np.abs(edges[0]) == 0  # with numbers too small for a bin of their own
    return ImageHistograms(counts, np.where(is_zero, 0.0, middle), np.where(is_zero, 0.0, width), low, high)
