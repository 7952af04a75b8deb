"""Bias correction (Nagel 2019, arXiv:1906.04721, section 4.2; empirical, appendix D): no layer shifts its mean."""

from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network


def bias_correct(network: Network) -> None:
    """Adds to each bias the mean that quantization took from the layer's output, from first to last layer.

    Inputs are those of the network quantized so far. Undone as a whole if the outputs' error is larger for it.
    """
    if not network.is_complete:
        min_max(network)
    error, before = network.error(), network.biases()
    corrected = [name for name, layer in network.layers.items() if layer.use_bias and not network.is_shared(name)]
    expected = network.mean_linear_outputs(corrected)
    for name in network.progress(corrected, "bias correction"):
        network.set_bias(name, expected[name] - network.mean_linear_output_of_quantized(name))
    if not network.error() < error:
        network.notes.append("bias correction undone: the outputs' error was no smaller for it")
        for name, bias in before.items():
            network.set_bias(name, bias)
