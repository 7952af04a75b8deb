"""Bias correction (Nagel 2019, arXiv:1906.04721, section 4.2; empirical, appendix D): no layer shifts its mean."""

from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network


def bias_correct(network: Network) -> None:
    """Adds to each bias the mean that quantization took from the layer's output, from the first layer to the last.

    Inputs of a layer are those of the network quantized so far. All corrections are undone if they do not reduce the
    error of the network's outputs.
    """
    if not network.is_complete:
        min_max(network)
    error, biases = network.compute_error(), network.get_quantized_biases()
    names = [name for name, layer in network.layers.items() if layer.use_bias and not network.is_shared(name)]
    expected = network.compute_mean_linear_outputs(names)
    for name in network.show_progress(names, "bias correction"):
        network.set_bias(name, expected[name] - network.compute_mean_quantized_linear_output(name))
    if not network.compute_error() < error:
        network.notes.append("bias correction was undone: it did not reduce the error of the outputs")
        for name, bias in biases.items():
            network.set_bias(name, bias)
