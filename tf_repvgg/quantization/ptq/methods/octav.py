"""OCTAV (Sakr 2022, arXiv:2206.06501): clipping weights where clipping and rounding together cost least."""

import numpy as np

from tf_repvgg.quantization.ptq.methods.mse import set_ranges_mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.uniform import largest_magnitude, round_to_grid

_ITERATIONS = 100


def octav(network: Network) -> None:
    """Sets all kernels, clipped by `find_optimal_clip`, and all activation ranges, by default as `mse` does.

    Unlike the search of `mse`, the formula models rounding as the noise of a grid of 2^bits levels. The actual grid has
    two fewer levels and a little more noise, so that outliers keep a little more of their size.
    """
    network.set_ranges(set_ranges_mse)
    for name in network.layers:
        kernel, bits = network.kernel(name), network.bits[name]
        largest = find_optimal_clip(kernel, bits, network.per_channel[name])
        network.set_kernel(name, round_to_grid(kernel, largest, bits, network.min_scale(name)))


def find_optimal_clip(kernel: np.ndarray, bits: int, per_channel: bool) -> np.ndarray:
    """The magnitude s at which to clip, by Newton's iteration (equation 6).

    It minimizes 4^-bits / 3 * s^2 * (share of weights within s) + (mean of (|w| - s)^2 over those beyond).

    Args:
      kernel: Float kernel [..., output channels].
      bits: Width of the codes.
      per_channel: Whether each output channel has a scale of its own.

    Returns:
      Float32 array [output channels] or [1].
    """
    axes = tuple(range(np.ndim(kernel) - 1)) if per_channel else None
    magnitude = np.abs(np.asarray(kernel, np.float64))
    noise = 4.0**-bits / 3
    clip = np.mean(magnitude, axis=axes, keepdims=True)
    for _ in range(_ITERATIONS):
        beyond = magnitude > clip
        count = np.sum(beyond, axis=axes, keepdims=True)
        within = np.sum((magnitude > 0) & ~beyond, axis=axes, keepdims=True)
        total = np.sum(magnitude, axis=axes, keepdims=True, where=beyond)
        before, clip = clip, np.divide(total, noise * within + count, out=clip.copy(), where=count > 0)
        if np.allclose(clip, before, rtol=1e-6, atol=0):
            break
    return np.minimum(clip.reshape(-1).astype(np.float32), largest_magnitude(kernel, per_channel))
