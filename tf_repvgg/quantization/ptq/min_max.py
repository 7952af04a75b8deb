"""Min-max: every range is that of the values, so that nothing is clipped."""

import numpy as np

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.uniform import quantize_min_max


def min_max(network: Network) -> None:
    """Sets all activation ranges and all kernels."""
    ranges_min_max(network)
    for name in network.layers:
        network.set_kernel(
            name,
            quantize_min_max(network.kernel(name), network.bits[name], network.per_channel, network.min_scale(name)),
        )


def ranges_min_max(network: Network) -> None:
    """Sets all activation ranges to the smallest and largest values seen."""
    for name, (minimum, maximum) in extremes(network).items():
        network.quantizers[name].set_range(minimum, maximum)


def extremes(network: Network) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each activation on the calibration images."""
    found = dict.fromkeys(network.free_ranges, (np.inf, -np.inf))
    for activations in network.activations():
        for name, values in activations.items():
            minimum, maximum = found[name]
            found[name] = min(minimum, float(values.min())), max(maximum, float(values.max()))
    return found
