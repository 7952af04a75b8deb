"""Min-max: every range reaches from the smallest to the largest value, so that nothing is clipped."""

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import measure_extremes
from tf_repvgg.quantization.uniform import quantize_min_max


def min_max(network: Network) -> None:
    """Sets all activation ranges, unless a method before has a rule for them, and all kernels."""
    network.set_ranges(set_ranges_min_max)
    for name in network.layers:
        network.set_kernel(
            name,
            quantize_min_max(
                network.kernel(name), network.bits[name], network.per_channel[name], network.min_scale(name)
            ),
        )


def set_ranges_min_max(network: Network) -> None:
    """Sets all activation ranges to the smallest and largest value on the calibration images."""
    for name, (minimum, maximum) in measure_extremes(network).items():
        network.quantizers[name].set_range(minimum, maximum)
