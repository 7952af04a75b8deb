"""Which channels of a network can be scaled without a change of its function, and which must share one factor."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import RANGE_PRESERVING
from tf_repvgg.quantization.ptq.network import Network, spread_over_kernel
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, restore_kernel

# The group of all channels whose factor is 1.
FIXED = 0
# Layers that pass a positive factor of a channel of their last axis: f(s x) = s f(x).
_RESHAPING = (keras.layers.Flatten, keras.layers.Reshape)
_PASSING = {
    *RANGE_PRESERVING,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.LeakyReLU,
} - {*_RESHAPING, keras.layers.Permute}
_MERGING = (keras.layers.Add, keras.layers.Average, keras.layers.Maximum, keras.layers.Minimum, keras.layers.Subtract)
_HOMOGENEOUS_ACTIVATIONS = ("leaky_relu", "linear", "relu")
_LIMITS = {"relu6": 6.0}


class Clip(NamedTuple):
    """A ReLU with an upper limit, such as ReLU6.

    Attributes:
      layer: Name of the layer that ends with it.
      tensor: Keras tensor of its output.
      limit: Largest output.
      groups: Group of each channel, int [channels].
    """

    layer: str
    tensor: Any
    limit: float
    groups: np.ndarray


class ChannelGroups(NamedTuple):
    """Groups of channels: all channels of a group, wherever they are in the network, share one factor.

    If x / d takes the place of x for every channel, with d the factor of the channel's group, the network computes the
    same outputs once kernels and biases are scaled along (see `scale_channels`). The factor of group `FIXED` is 1.

    Attributes:
      number_of_groups: Number of groups, which are numbered from 0.
      inputs: {name of a layer with weights: group of each input channel, int [input channels]}.
      outputs: {name of a layer with weights: group of each output channel, int [output channels]}.
      activations: {name of a quantizer: group of each channel that it rounds, int [channels]}.
      clips: Limits that outputs meet on the way; they stay where they are if channels are scaled.
    """

    number_of_groups: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    activations: dict[str, np.ndarray]
    clips: list[Clip]

    def fix(self, numbers: np.ndarray) -> "ChannelGroups":
        """The groups after channels of the given groups have become fixed ones; numbers stay as they are."""
        targets = np.arange(self.number_of_groups)
        targets[numbers] = FIXED
        return self.renumber(self.number_of_groups, targets)

    def renumber(self, number_of_groups: int, numbers: np.ndarray) -> "ChannelGroups":
        """The groups with other numbers.

        Args:
          number_of_groups: Number of groups afterwards.
          numbers: New number of each channel's group.
        """
        inputs, outputs, activations = (
            {name: numbers[channels] for name, channels in table.items()}
            for table in (self.inputs, self.outputs, self.activations)
        )
        clips = [clip._replace(groups=numbers[clip.groups]) for clip in self.clips]
        return ChannelGroups(number_of_groups, inputs, outputs, activations, clips)


def find_channel_groups(network: Network) -> ChannelGroups:
    """Finds the groups of a network's channels, from its float form.

    A layer with weights reads groups and writes new ones. Homogeneous layers (ReLU, pooling, zero padding, reshaping)
    pass a channel's group on, a concatenation those of all its inputs. A sum, a maximum, and a layer that is called
    more than once join groups. A product with a gate passes the groups of the factor that is not fixed. All other
    layers, and the inputs and outputs of the network, have fixed channels.

    Args:
      network: Network whose kernels may be scaled.
    """
    # By the nodes of the model alone: methods attach more readers to its layers when they run parts of it.
    grouping = _Grouping(network)
    for tensor in network.float.inputs:
        grouping.groups[str(id(tensor))] = _fix_all(tensor)
    for node in graph.nodes(network.float):
        grouping.follow(node)
    for key in graph.output_keys(network.float):
        grouping.fix(grouping.groups[key])
    return grouping.result()


def scale_channels(network: Network, groups: ChannelGroups, divisors: np.ndarray) -> None:
    """Divides the channels of every group by its factor, in all kernels and biases of the float form.

    Args:
      network: Network to change; `network.divisors` follow.
      groups: Groups of the network's channels.
      divisors: Factor of each group, [groups], 1 for `FIXED`.
    """
    for name, layer in network.layers.items():
        written, read = divisors[groups.outputs[name]], divisors[groups.inputs[name]]
        kernel, bias = network.kernel(name), network.bias(name)
        scaled = (kernel * spread_over_kernel(read, kernel.shape) / written).astype(np.float32)
        rest = [(bias / written).astype(np.float32)] if layer.use_bias else []
        layer.set_weights([restore_kernel(layer, scaled), *rest])
        network.divisors[name] = (network.divisors[name] * written).astype(np.float32)


class _Grouping:
    """Groups while they are being found: union-find over the channels of all tensors."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._parents = [FIXED]
        self.groups: dict[str, np.ndarray] = {}  # by the graph's key of the tensor
        self._inputs: dict[str, np.ndarray] = {}
        self._outputs: dict[str, np.ndarray] = {}
        self._activations: dict[str, np.ndarray] = {}
        self._clips: list[Clip] = []

    def follow(self, node: Any) -> None:
        """Adds the groups of a node's outputs."""
        layer, inputs = node.layer, [self.groups[key] for key in node.flat_input_ids]
        tensors = tf.nest.flatten(node.outputs)
        if layer.name in self._network.layers:
            outputs = self._follow_weighted(layer, inputs[0])
        else:
            outputs = self._follow_plain(layer, inputs, tensors)
        if outputs is not None and (limit := _find_limit(layer)) is not None:
            self._clips.append(Clip(layer.name, tensors[0], limit, outputs))
        if outputs is None or len(outputs) != len(_fix_all(tensors[0])):
            for channels in inputs:
                self.fix(channels)
        if outputs is None:
            self.groups.update(zip(node.flat_output_ids, map(_fix_all, tensors), strict=True))
        else:
            self.groups[node.flat_output_ids[0]] = outputs
        if layer.name in self._network.quantizers:
            self._activations[layer.name] = self.groups[node.flat_output_ids[0]]

    def _follow_weighted(self, layer, channels):
        name = layer.name
        if name not in self._inputs:
            self._inputs[name] = channels
            count = len(self._network.bias(name))
            first = len(self._parents)
            self._parents.extend(range(first, first + count))
            self._outputs[name] = np.arange(first, first + count)
            if not _passes(layer):
                self.fix(self._outputs[name])
        self._join(self._inputs[name], channels)
        return self._outputs[name]

    def _follow_plain(self, layer, inputs, tensors):
        """Groups of the output of a layer without weights; None if it passes no factors."""
        kind, count = type(layer), len(_fix_all(tensors[0]))
        if len(tensors) > 1 or getattr(layer, "data_format", "channels_last") != "channels_last" or not _passes(layer):
            return None
        if kind in _RESHAPING:
            return np.tile(inputs[0], count // len(inputs[0])) if count % len(inputs[0]) == 0 else None
        if kind is keras.layers.Concatenate and layer.axis in (-1, len(tensors[0].shape) - 1):
            return np.concatenate(inputs)
        if len({len(channels) for channels in inputs}) > 1:
            return None
        if kind is keras.layers.Multiply:
            return self._multiply(inputs)
        if kind in _MERGING or kind is keras.layers.Concatenate:
            for channels in inputs[1:]:
                self._join(inputs[0], channels)
            return inputs[0]
        return inputs[0] if len(inputs) == 1 else None

    def _multiply(self, inputs):
        free = [channels for channels in inputs if any(self._find(channel) != FIXED for channel in channels)]
        for channels in free[1:]:
            self.fix(channels)
        return free[0] if free else inputs[0]

    def fix(self, channels: np.ndarray) -> None:
        """Fixes the factors of channels."""
        self._join(np.full_like(channels, FIXED), channels)

    def _join(self, channels, others):
        for channel, other in zip(channels, others, strict=True):
            first, second = sorted((self._find(channel), self._find(other)))
            self._parents[second] = first  # FIXED is the smallest

    def _find(self, channel):
        while (parent := self._parents[channel]) != channel:
            self._parents[channel] = self._parents[parent]
            channel = parent
        return channel

    def result(self) -> ChannelGroups:
        """The groups, numbered without gaps."""
        roots = [self._find(channel) for channel in range(len(self._parents))]
        values, numbers = np.unique(roots, return_inverse=True)  # FIXED stays the first
        groups = ChannelGroups(0, self._inputs, self._outputs, self._activations, self._clips)
        return groups.renumber(len(values), numbers)


def _fix_all(tensor):
    """Groups of a tensor whose channels are fixed."""
    channels = tensor.shape[-1] if tensor.shape.rank and tensor.shape.rank > 1 else None
    return np.full(channels or 1, FIXED)


def _passes(layer):
    """Whether a layer computes s y from s x, up to a limit, if its inputs have the same factor or are concatenated."""
    if type(layer) is keras.layers.ReLU:
        return not np.any(layer.threshold)  # a slope below zero scales along
    if isinstance(layer, WEIGHTED_LAYERS) or type(layer) is keras.layers.Activation:
        return layer.activation.__name__ in (*_HOMOGENEOUS_ACTIVATIONS, *_LIMITS)
    # Exactly these classes: a subclass may compute something else.
    return type(layer) in (*_PASSING, *_RESHAPING, *_MERGING, keras.layers.Concatenate, keras.layers.Multiply)


def _find_limit(layer):
    """Largest output of a layer that passes factors; None if there is no limit."""
    if type(layer) is keras.layers.ReLU:
        return None if layer.max_value is None else float(layer.max_value)
    return _LIMITS.get(getattr(getattr(layer, "activation", None), "__name__", ""))
