"""Bias correction (Nagel 2019, arXiv:1906.04721, section 4.2; empirical, appendix D): no layer shifts its mean."""

from collections.abc import Callable

from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.walk import Walk


def bias_correct(network: Network) -> None:
    """Adds to each bias the mean that quantization took from the layer's output, from the first layer to the last.

    Inputs of a layer are those of the network quantized so far. All corrections are undone if they do not reduce the
    error of the network's outputs.
    """
    if not network.is_complete:
        min_max(network)
    keep_if_better(network, correct_biases, "bias correction")


def keep_if_better(network: Network, correct: Callable[[Network], float], name: str) -> None:
    """Corrects biases, and undoes it if the error of the network's outputs does not shrink; notes that.

    Args:
      network: Network with ranges and kernels set.
      correct: Function that sets biases of the network, and returns the error of its outputs afterwards.
      name: Name of the correction, for the note.
    """
    error, biases = network.compute_error(), network.get_quantized_biases()
    if not correct(network) < error:
        network.notes.append(f"{name} was undone: it did not reduce the error of the outputs")
        for layer, bias in biases.items():
            network.set_bias(layer, bias)


def correct_biases(network: Network) -> float:
    """Corrects the biases of all layers that are called once, whether or not the network's outputs become better.

    Args:
      network: Network with ranges and kernels set.

    Returns:
      Error of the network's outputs afterwards; see `Network.compute_error`.
    """
    names = [name for name, layer in network.layers.items() if layer.use_bias and not network.is_shared(name)]
    expected = network.compute_mean_linear_outputs(names)
    inputs = {name: network.quantized.get_layer(name).input for name in names}
    walk = Walk(network.calibration, network.quantized, [*inputs.values(), *network.quantized.outputs])
    for name in network.show_progress(names, "bias correction"):
        shifted = network.apply_to_mean_input(name, walk.compute_mean(inputs[name]))
        network.set_bias(name, expected[name] - shifted)
    return network.compute_error([walk.compute(tensor) for tensor in network.quantized.outputs])
