"""High-bias absorption (Nagel 2019, arXiv:1906.04721, section 4.1.3): smaller ranges of activations."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import relu_name
from tf_repvgg.quantization.ptq.network import Network, spread_over_kernel
from tf_repvgg.quantization.quantized_layers import apply_kernel

# Layers that pass an offset of a channel: f(x + c) = f(x) + c, for ReLU if x and x + c are above zero.
_PASSING = (
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)


class Absorber(NamedTuple):
    """What takes over a part of a layer's bias.

    Attributes:
      layer: Layer that gives a part of its bias away.
      readers: All layers with weights that read its output, after a ReLU.
      pads: Whether zeros are padded on the way, at whose borders the function changes.
    """

    layer: Any
    readers: list[Any]
    pads: bool


def absorb_high_biases(
    network: Network,
    moments: Callable[[list[str]], dict[str, tuple[np.ndarray, np.ndarray]]] | None = None,
    into_padding: bool = True,
) -> dict[str, np.ndarray]:
    """Moves the part of each bias that almost always passes the ReLU into the next layers' biases (equation 15).

    That part is c = max(0, mean - 3 standard deviations): away from zero padding, the function stays the same for
    inputs above c. It passes ReLU, pooling and zero padding; depthwise and grouped layers take it over as others do.

    Args:
      network: Network whose float form is changed.
      moments: Layer names -> {name: (mean, standard deviation) of its output before the activation, each [output
        channels]}; by default those on the calibration images.
      into_padding: Whether to absorb also where zeros are padded on the way, at whose borders the function changes.

    Returns:
      {layer name: c of each channel} of the layers from which a bias was absorbed.
    """
    absorbers = [absorber for absorber in find_absorbers(network) if into_padding or not absorber.pads]
    names = [absorber.layer.name for absorber in absorbers]
    measured = moments(names) if moments else measure_moments(network, names)
    absorbed = {}
    for layer, readers, _ in absorbers:
        mean, deviation = measured[layer.name]
        amount = absorbed[layer.name] = np.maximum(0, mean - 3 * deviation)
        layer.bias.assign(layer.bias - amount)
        for reader in readers:
            kernel = network.kernel(reader.name)
            # After a layer that flattens pixels, channels repeat.
            inputs = np.resize(amount, int(reader.input_spec.axes[-1]))
            sums = np.sum(kernel * spread_over_kernel(inputs, kernel.shape), axis=tuple(range(kernel.ndim - 1)))
            reader.bias.assign_add(sums)
    return absorbed


def find_absorbers(network: Network) -> list[Absorber]:
    """Finds the layers from which a bias can be absorbed, in execution order.

    Args:
      network: Network in whose float form to look.
    """
    calls: collections.Counter[str] = collections.Counter()
    readers: dict[str, list] = collections.defaultdict(list)
    nodes = graph.nodes(network.float)
    for node in nodes:
        calls[node.layer.name] += 1
        for key in node.flat_input_ids:
            readers[key].append(node)
    search = _Search(network, calls, readers, graph.output_keys(network.float))
    return [absorber for node in nodes if (absorber := search.find(node)) is not None]


class _Search(NamedTuple):
    network: Network
    calls: collections.Counter
    readers: dict[str, list]
    outputs: set[str]

    def find(self, node):
        if not (self._is_weighted(node) and self._has_own_bias(node.layer)):
            return None
        activation = node.layer.activation.__name__
        if activation not in ("linear", "relu"):
            return None
        reached = self._follow(node, is_rectified=activation == "relu", pads=False)
        if reached is None:
            return None
        layers = {layer.name: layer for layer, _ in reached}
        return Absorber(node.layer, list(layers.values()), any(pads for _, pads in reached))

    def _follow(self, node, is_rectified, pads):
        """[(layer, whether zeros are padded before)] of all layers with weights after a node; None if others follow."""
        (key, *others), reached = node.flat_output_ids, []
        if others or key in self.outputs or not self.readers[key]:
            return None
        for reader in self.readers[key]:
            paths = self._follow_reader(reader, is_rectified, pads)
            if paths is None:
                return None
            reached += paths
        return reached

    def _follow_reader(self, reader, is_rectified, pads):
        layer = reader.layer
        if self._is_weighted(reader):
            if not is_rectified or not self._has_own_bias(layer) or _differs_by_pixel(layer):
                return None
            return [(layer, pads or _pads(layer))]
        if _is_activation(layer, "relu"):
            return self._follow(reader, True, pads)
        passes = type(layer) in _PASSING and getattr(layer, "data_format", "channels_last") == "channels_last"
        if not (passes or _is_activation(layer, "linear")):
            return None
        if isinstance(layer, keras.layers.ZeroPadding2D):
            if not is_rectified:  # the zeros would pass the ReLU
                return None
            pads = True
        return self._follow(reader, is_rectified, pads)

    def _is_weighted(self, node):
        return node.layer.name in self.network.layers

    def _has_own_bias(self, layer):
        return layer.use_bias and self.calls[layer.name] == 1


def _is_activation(layer, name):
    if type(layer) is keras.layers.ReLU:
        return relu_name(layer) == name
    return type(layer) is keras.layers.Activation and layer.activation.__name__ == name


def _differs_by_pixel(layer):
    """Whether an offset of a layer's inputs is another one at each pixel of its outputs."""
    return isinstance(layer, keras.layers.Conv2DTranspose)


def _pads(layer):
    return getattr(layer, "padding", "valid") == "same" and max(layer.kernel_size) > 1


def measure_moments(network: Network, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Moments of float outputs before the activation, on the calibration images.

    Args:
      network: Network to run.
      names: Names of layers.

    Returns:
      {name: (mean, standard deviation), each [output channels]}.
    """
    if not names:
        return {}
    layers = [network.layers[name] for name in names]
    kernels = [tf.constant(network.kernel(name)) for name in names]
    sums = {name: np.zeros([2, len(network.bias(name))]) for name in names}
    counts: collections.Counter[str] = collections.Counter()
    for batch in network.calibration.compute_batches(network.float, [layer.input for layer in layers]):
        for layer, kernel, inputs in zip(layers, kernels, batch, strict=True):
            values = tf.reshape(apply_kernel(layer, inputs, kernel), [-1, kernel.shape[-1]])
            counts[layer.name] += len(values)
            sums[layer.name] += [tf.reduce_sum(values, 0), tf.reduce_sum(tf.square(values), 0)]
    moments = {}
    for name, (first, second) in sums.items():
        mean = first / counts[name]
        moments[name] = mean + network.bias(name), np.sqrt(np.maximum(second / counts[name] - mean**2, 0))
    return moments
