"""Cross-layer equalization (Nagel 2019, arXiv:1906.04721, section 4.1): like ranges, same function."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.network import Network

_SWEEPS = 30
_CONVERGED = 1e-3
# Training can shrink all weights of a channel to nothing, and leave its bias. Equalized, such a channel's bias would
# leave all bounds. Share of the layer's largest weight: what float32 loses beside it.
_NEGLIGIBLE = np.finfo(np.float32).eps
# What lets a positive factor of a channel pass: relu(s x) = s relu(x), and so for maxima, means and zeros.
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
    """Moves a factor of every channel from each layer to the next one, until their ranges are alike.

    With r1 and r2 the largest magnitudes of channel i in the kernels before and after it, s = sqrt(r1 / r2) divides the
    first and multiplies the second (equation 11). Where a channel is read by more than one layer, or something other
    than ReLU, pooling and zero padding stands between, layers are left as they are and named in the network's notes.
    Channels without weights, or with none that matter, stay as they are.
    """
    pairs = chain_pairs(network)
    for _ in range(_SWEEPS):
        largest = 0.0
        for first, second in pairs:
            factor = _equalize_pair(first, second)
            network.divisors[first.name] *= factor
            largest = max(largest, float(np.max(np.abs(np.log(factor)))))
        if largest < _CONVERGED:
            break
    firsts = {first.name for first, _ in pairs}
    if left := [name for name in list(network.layers)[:-1] if name not in firsts]:
        network.notes.append(f"not equalized with what follows them: {', '.join(left)}")


def chain_pairs(network: Network) -> list[tuple]:
    """(layer, next layer) wherever a channel's factor can move from one to the other."""
    # By the model's own nodes: methods hang further readers on its layers, to look at what they compute.
    readers = {}
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
        of_output = readers.get(str(id(layer.output)), [])
        if len(of_output) != 1 or of_output[0] is None:
            return None
        (layer,) = of_output
        if layer.name in weighted:
            return layer if _takes_factors(layer) else None
    return None


def _passes_factors(layer, is_first):
    if is_first or isinstance(layer, keras.layers.Activation):
        is_plain = not isinstance(layer, keras.layers.DepthwiseConv2D)
        return is_plain and layer.activation.__name__ in _HOMOGENEOUS_ACTIVATIONS
    return isinstance(layer, _HOMOGENEOUS) or (isinstance(layer, keras.layers.ReLU) and layer.max_value is None)


def _takes_factors(layer):
    """Whether the kernel's second last axis is the channels read: no groups, and called once."""
    is_plain = type(layer) is keras.layers.Dense or (type(layer) is keras.layers.Conv2D and layer.groups == 1)
    return is_plain and len(layer.inbound_nodes) == 1


def _equalize_pair(first, second):
    """Equalizes one pair; returns the factor of each channel."""
    before, *bias = first.get_weights()
    after, *rest = second.get_weights()
    r1 = np.max(np.abs(before), axis=tuple(range(before.ndim - 1)))
    r2 = np.max(np.abs(after), axis=(*range(after.ndim - 2), after.ndim - 1))
    is_alive = (r1 > _NEGLIGIBLE * np.max(r1)) & (r2 > _NEGLIGIBLE * np.max(r2))
    factor = np.sqrt(np.where(is_alive, r1, 1) / np.where(is_alive, r2, 1)).astype(np.float32)
    first.set_weights([before / factor, *(values / factor for values in bias)])
    second.set_weights([after * factor[:, np.newaxis], *rest])
    return factor
