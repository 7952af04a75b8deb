"""DFQ (Nagel 2019, arXiv:1906.04721) with calibration data: equalization, high-bias absorption, bias correction."""

from collections.abc import Callable

import numpy as np
import tf_keras as keras

from tf_repvgg.quantization.ptq.methods.bias_correct import bias_correct
from tf_repvgg.quantization.ptq.methods.equalize import equalize, find_pairs
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network


def dfq(network: Network) -> None:
    """Changes the float network, then sets all ranges, kernels and biases.

    Absorption is kept only if it reduces the error of the quantized network. The notes report how far it changed the
    float network's outputs, and whether it was kept.
    """
    equalize(network)
    _quantize(network)
    error, weights = network.compute_error(), {name: layer.get_weights() for name, layer in network.layers.items()}
    absorb_high_biases(network)
    change = _measure_change(network.reference_outputs, network.compute_float_outputs())
    _quantize(network)
    is_better = network.compute_error() < error
    verdict = "kept" if is_better else "undone, because it did not reduce the error of the quantized network"
    network.notes.append(
        f"high-bias absorption changed the float outputs by {100 * change:.2g} % of the largest; {verdict}"
    )
    if not is_better:
        for name, layer in network.layers.items():
            layer.set_weights(weights[name])
        _quantize(network)


def _quantize(network):
    min_max(network)
    bias_correct(network)


def _measure_change(before, after):
    """Largest change of any output, relative to its largest magnitude."""
    pairs = zip(before, after, strict=True)
    return max(float(np.max(np.abs(old - new)) / max(np.max(np.abs(old)), 1e-30)) for old, new in pairs)


def absorb_high_biases(
    network: Network,
    moments: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
    into_padding: bool = True,
) -> dict[str, np.ndarray]:
    """Moves the part of each bias that almost always passes the ReLU into the next layer's bias (equation 15).

    That part is c = max(0, mean - 3 standard deviations): away from zero padding, the function stays the same for
    inputs above c.

    Args:
      network: Network whose float form is changed.
      moments: Layer name -> (mean, standard deviation) of its output before the activation, each [output channels]; by
        default those on the calibration images.
      into_padding: Whether to absorb also where the next layer pads with zeros, at whose borders the function changes.

    Returns:
      {layer name: c of each channel} of the layers from which a bias was absorbed.
    """
    absorbed = {}
    for first, second in find_pairs(network):
        if first.activation.__name__ != "relu" or not (first.use_bias and second.use_bias):
            continue
        if isinstance(second, keras.layers.Conv2DTranspose):  # no bias is the same for all pixels of its output
            continue
        if not into_padding and _pads(first, second):
            continue
        mean, deviation = moments(first.name) if moments else _measure_moments(network, first.name)
        amount = absorbed[first.name] = np.maximum(0, mean - 3 * deviation)
        kernel, bias = second.get_weights()
        first.bias.assign(first.bias - amount)
        second.bias.assign(bias + kernel.sum(axis=tuple(range(kernel.ndim - 2))).T @ amount)
    return absorbed


def _measure_moments(network, name):
    values = network.compute_linear_outputs(name)
    axes = tuple(range(values.ndim - 1))
    return values.mean(axes), values.std(axes)


def _pads(first, second):
    """Whether the outputs of the first layer are padded with zeros before the second one reads them."""
    if isinstance(second, keras.layers.Conv2D) and second.padding == "same" and max(second.kernel_size) > 1:
        return True
    layer = second
    while layer is not first:
        layer = layer.inbound_nodes[0].keras_inputs[0].node.layer
        if isinstance(layer, keras.layers.ZeroPadding2D):
            return True
    return False
