"""Min-max: every range is that of the values, so that nothing is clipped."""

from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import extremes
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
