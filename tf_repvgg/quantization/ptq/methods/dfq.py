"""DFQ (Nagel 2019, arXiv:1906.04721) with calibration data: equalization, high-bias absorption, bias correction."""

from tf_repvgg.quantization.ptq.absorption import absorb_high_biases, find_absorbers, measure_moments
from tf_repvgg.quantization.ptq.methods.bias_correct import correct_biases
from tf_repvgg.quantization.ptq.methods.equalize import equalize, measure_change
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network


def dfq(network: Network) -> None:
    """Changes the float network, then sets all ranges, kernels and biases.

    Absorption is kept only if it reduces the error of the quantized network: everywhere, or else only where no zeros
    are padded. The notes report how far it changed the float network's outputs, and whether it was kept.
    """
    equalize(network)
    error = _quantize(network)
    absorbers = find_absorbers(network)
    moments = measure_moments(network, [absorber.layer.name for absorber in absorbers])
    for into_padding in sorted({absorber.pads for absorber in absorbers}, reverse=True):
        if _absorb(network, error, moments, into_padding):
            return


def _absorb(network, error, moments, into_padding):
    """Absorbs biases and quantizes again; returns whether that is better, and undoes it otherwise."""
    weights, kernels = [model.get_weights() for model in (network.float, network.quantized)], dict(network.kernels)
    absorb_high_biases(network, lambda names: {name: moments[name] for name in names}, into_padding)
    change = measure_change(network.reference_outputs, network.compute_float_outputs())
    is_better = _quantize(network) < error
    verdict = "kept" if is_better else "undone, because it did not reduce the error of the quantized network"
    place = "" if into_padding else " where no zeros are padded"
    network.notes.append(
        f"high-bias absorption{place} changed the float outputs by {100 * change:.2g} % of the largest; {verdict}"
    )
    if not is_better:
        for model, values in zip((network.float, network.quantized), weights, strict=True):
            model.set_weights(values)
        network.kernels.update(kernels)
    return is_better


def _quantize(network):
    """Quantizes the float network as it is now; returns the error of the outputs."""
    min_max(network)
    return correct_biases(network)
