"""Cross-layer equalization (Nagel 2019, arXiv:1906.04721, section 4.1): matching ranges, same function."""

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.quantized_layers import kernel_of, restore_kernel

_SWEEPS = 30
_CONVERGED = 1e-3
# Training can shrink all weights of a channel to nothing, and leave its bias. Equalizing such a channel would scale its
# bias without bound. As a share of the layer's largest weight: smaller weights vanish beside it in float32.
_NEGLIGIBLE = np.finfo(np.float32).eps
# Layers that pass a positive factor of a channel: relu(s x) = s relu(x), and likewise for maxima, means and zeros.
_HOMOGENEOUS = (
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)
_HOMOGENEOUS_ACTIVATIONS = ("linear", "relu")


def equalize(network: Network) -> None:
    """Moves a factor of every channel from each layer to the next one, until their ranges match.

    With r1 and r2 the largest magnitudes of channel i in the kernels before and after it, s = sqrt(r1 / r2) divides the
    first and multiplies the second (equation 11). A layer stays as it is, and is named in the network's notes, where
    more than one layer reads its channels, or where anything but ReLU, pooling and zero padding stands before the next
    layer. Channels whose weights are all zero or negligible stay as they are.
    """
    pairs = find_pairs(network)
    for _ in range(_SWEEPS):
        largest = 0.0
        for first, second in pairs:
            factor = _equalize_pair(first, second)
            network.divisors[first.name] *= factor
            largest = max(largest, float(np.max(np.abs(np.log(factor)))))
        if largest < _CONVERGED:
            break
    equalized = {first.name for first, _ in pairs}
    if skipped := [name for name in list(network.layers)[:-1] if name not in equalized]:
        network.notes.append(f"layers not equalized with the next one: {', '.join(skipped)}")


def find_pairs(network: Network) -> list[tuple[Any, Any]]:
    """(layer, next layer) wherever a channel's factor can move from the first to the second."""
    # By the nodes of the model alone: methods attach more readers to its layers when they run parts of it.
    readers: dict[str, list] = {}
    for node in graph.nodes(network.float):
        for key in node.flat_input_ids:
            readers.setdefault(key, []).append(node.layer)
    for tensor in tf.nest.flatten(network.float.outputs):
        readers.setdefault(str(id(tensor)), []).append(None)
    pairs = [(layer, _next_layer(layer, network.layers, readers)) for layer in network.layers.values()]
    return [(first, second) for first, second in pairs if second is not None]


def _next_layer(first, weighted, readers):
    layer = first
    while _passes_factors(layer, is_first=layer is first) and len(layer.inbound_nodes) == 1:
        output_readers = readers.get(str(id(layer.output)), [])
        if len(output_readers) != 1 or output_readers[0] is None:
            return None
        (layer,) = output_readers
        if layer.name in weighted:
            return layer if _takes_factors(layer) else None
    return None


def _passes_factors(layer, is_first):
    if is_first or isinstance(layer, keras.layers.Activation):
        is_plain = not isinstance(layer, keras.layers.DepthwiseConv2D)
        return is_plain and layer.activation.__name__ in _HOMOGENEOUS_ACTIVATIONS
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value is None and not np.any(layer.threshold)  # a slope below zero scales along
    return isinstance(layer, _HOMOGENEOUS)


def _takes_factors(layer):
    """Whether every output channel reads all input channels: no groups, and the layer is called once."""
    is_plain = type(layer) in (keras.layers.Dense, keras.layers.Conv2DTranspose)
    is_plain |= type(layer) is keras.layers.Conv2D and layer.groups == 1
    return is_plain and len(layer.inbound_nodes) == 1


def _equalize_pair(first, second):
    """Equalizes one pair; returns the factor of each channel."""
    before, after = kernel_of(first), kernel_of(second)
    _, *bias = first.get_weights()
    _, *rest = second.get_weights()
    r1 = np.max(np.abs(before), axis=tuple(range(before.ndim - 1)))
    r2 = np.max(np.abs(after), axis=(*range(after.ndim - 2), after.ndim - 1))
    is_alive = (r1 > _NEGLIGIBLE * np.max(r1)) & (r2 > _NEGLIGIBLE * np.max(r2))
    factor = np.sqrt(np.where(is_alive, r1, 1) / np.where(is_alive, r2, 1)).astype(np.float32)
    first.set_weights([restore_kernel(first, before / factor), *(values / factor for values in bias)])
    second.set_weights([restore_kernel(second, after * factor[:, np.newaxis]), *rest])
    return factor
