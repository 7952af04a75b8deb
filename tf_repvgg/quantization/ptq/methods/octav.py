"""OCTAV (Sakr 2022, arXiv:2206.06501): where to clip weights so that clipping and rounding together cost least."""

import numpy as np

from tf_repvgg.quantization.ptq.methods.mse import ranges_mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.uniform import largest_magnitude, round_to_grid

_ITERATIONS = 100


def octav(network: Network) -> None:
    """Sets all kernels, clipped by `optimal_clip`, and all activation ranges, as `mse` does.

    Unlike the search of `mse` it counts rounding as the noise of a grid of 2^bits levels, a little less than ours makes
    with two fewer levels, so that outliers keep a little more.
    """
    ranges_mse(network)
    for name in network.layers:
        kernel, bits = network.kernel(name), network.bits[name]
        largest = optimal_clip(kernel, bits, network.per_channel)
        network.set_kernel(name, round_to_grid(kernel, largest, bits, network.min_scale(name)))


def optimal_clip(kernel, bits: int, per_channel: bool) -> np.ndarray:
    """The magnitude s at which to clip, by Newton's iteration (equation 6): shape [output channels] or [1].

    It minimizes 4^-bits / 3 * s^2 * (share of weights within s) + (mean of (|w| - s)^2 over those beyond).
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
