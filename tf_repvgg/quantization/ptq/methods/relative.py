"""Relative error: activation ranges that serve each image alike, so that no single image decides them."""

import numpy as np

from tf_repvgg.quantization.activation_quantizer import round_to_codes
from tf_repvgg.quantization.ptq.methods.mse import set_kernels_mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import ImageHistograms, collect_image_histograms

# Ends of ranges as shares of the smallest or largest value: twelve octaves in steps of a quarter.
_SHARES = 2.0 ** (-np.arange(49) / 4)
_SWEEPS = 2


def relative(network: Network) -> None:
    """Sets all activation ranges, unless a method before has a rule for them, and all kernels as `mse` does."""
    network.set_ranges(set_ranges_relative)
    set_kernels_mse(network)


def set_ranges_relative(network: Network) -> None:
    """Sets all activation ranges, each by a search of its own, in one pass over the images."""
    for name, histograms in collect_image_histograms(network).items():
        network.quantizers[name].set_range(*search_relative_range(histograms, network.options.activation_bits))


def search_relative_range(histograms: ImageHistograms, bits: int = 8) -> tuple[float, float]:
    """The range q with the smallest mean over images of |q(h) - h|^2 / (|h|^2 + m), where m is the median of |h|^2.

    An image whose values are a hundred times those of the others counts no more than they do, unlike in a squared
    error; nor does one whose values are next to nothing, unlike in a purely relative error. Both ends shrink together
    first, then each by itself.

    Args:
      histograms: Values of the tensor on each image.
      bits: Bits of a code, 8 or 16.
    """
    full = np.array([min(histograms.low, 0.0), max(histograms.high, 0.0)])
    if not np.all(np.isfinite(full)) or not np.any(full):
        return float(full[0]), float(full[1])
    counts = _weigh_images(histograms) @ histograms.counts

    def find_best(candidates):
        return candidates[np.argmin(_compute_errors(histograms, counts, candidates, bits))]

    best = find_best(_SHARES[:, np.newaxis] * full)
    for _ in range(_SWEEPS):
        for end in np.argsort(-np.abs(full)):
            candidates = np.tile(best, (len(_SHARES), 1))
            candidates[:, end] = _SHARES * full[end]
            best = find_best(candidates)
    return float(best[0]), float(best[1])


def _weigh_images(histograms):
    """The weight of each image's squared error, [images]."""
    energies = histograms.counts @ np.square(histograms.values)
    total = energies + np.median(energies)
    return np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)


def _compute_errors(histograms, counts, candidates, bits):
    """Squared error of each candidate range, [candidates], summed over weighted counts [bins]."""
    values, low, high = histograms.values, candidates[:, :1], candidates[:, 1:]
    rounded, scale = round_to_codes(values, low, high, bits)
    error = np.square(rounded - values)
    # In a bin that spans several steps, errors of rounding are spread evenly.
    is_spread = (histograms.widths > scale) & (error <= np.square(scale))
    return np.where(is_spread, np.square(scale) / 12, error) @ counts
