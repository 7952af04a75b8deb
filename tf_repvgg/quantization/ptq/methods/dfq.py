"""DFQ (Nagel 2019, arXiv:1906.04721) with calibration data: equalization, high-bias absorption, bias correction."""

from collections.abc import Callable

import numpy as np
import tf_keras as keras

from tf_repvgg.quantization.ptq.methods.bias_correct import bias_correct
from tf_repvgg.quantization.ptq.methods.equalize import chain_pairs, equalize
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network


def dfq(network: Network) -> None:
    """Changes the float network, then sets all ranges, kernels and biases.

    Absorption is kept only where the quantized network ends with a smaller error for it; its error on the float network
    is in the notes either way.
    """
    equalize(network)
    _quantize(network)
    error, before = network.error(), {name: layer.get_weights() for name, layer in network.layers.items()}
    absorb_high_biases(network)
    pairs = zip(network.expected, network.float_outputs(), strict=True)
    change = max(float(np.max(np.abs(mine - its)) / max(np.max(np.abs(mine)), 1e-30)) for mine, its in pairs)
    _quantize(network)
    is_better = network.error() < error
    network.notes.append(
        f"high-bias absorption changed the float outputs by {100 * change:.2g} % of the largest; "
        + ("kept" if is_better else "undone, as the quantized network was no better for it")
    )
    if not is_better:
        for name, weights in before.items():
            network.layers[name].set_weights(weights)
        _quantize(network)


def _quantize(network):
    min_max(network)
    bias_correct(network)


def absorb_high_biases(
    network: Network, moments: Callable | None = None, into_padding: bool = True
) -> dict[str, np.ndarray]:
    """Moves what a channel's ReLU input exceeds almost always into the next layer's bias (equation 15).

    That is c = max(0, mean - 3 standard deviations): the function stays for inputs above c, away from zero padding.

    Args:
      moments: name of a layer -> (mean, standard deviation) of its output before the activation, per channel; by
        default on the calibration images.
      into_padding: whether also where the next layer pads with zeros, at whose borders the function changes.

    Returns:
      {layer: c of each channel}, where anything was absorbed from.
    """
    absorbed = {}
    for first, second in chain_pairs(network):
        if first.activation.__name__ != "relu" or not (first.use_bias and second.use_bias):
            continue
        if not into_padding and _pads(first, second):
            continue
        mean, deviation = moments(first.name) if moments else _measured(network, first.name)
        amount = absorbed[first.name] = np.maximum(0, mean - 3 * deviation)
        kernel, bias = second.get_weights()
        first.bias.assign(first.bias - amount)
        second.bias.assign(bias + kernel.sum(axis=tuple(range(kernel.ndim - 2))).T @ amount)
    return absorbed


def _measured(network, name):
    values = network.linear_outputs_of(name)
    axes = tuple(range(values.ndim - 1))
    return values.mean(axes), values.std(axes)


def _pads(first, second):
    """Whether zeros are put around what the second layer reads of the first."""
    if isinstance(second, keras.layers.Conv2D) and second.padding == "same" and max(second.kernel_size) > 1:
        return True
    layer = second
    while layer is not first:
        layer = layer.inbound_nodes[0].keras_inputs[0].node.layer
        if isinstance(layer, keras.layers.ZeroPadding2D):
            return True
    return False
