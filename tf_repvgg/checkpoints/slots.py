"""Where the weights of a network are, by block and part, in training and in deploy form; and whether PyTorch agrees.

A part is a layer of a block: "conv3x3", "norm3x3" and so on in training form, where it has the name of the block's
attribute, `MERGED` for the merged convolution of the deploy form, "se_reduce" and "se_expand" in both.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import OutlierAwareBatchNormalization, ReparameterizedBlock
from tf_repvgg.models import BLOCKS

HEAD = "logits"
MERGED = "merged"
TORCH_EPSILON = 1e-5

_PAIR = "_depthwise", "_pointwise"  # the two blocks of a pair of MobileOne
_BLOCK_NAME = re.compile(rf"stem|stage\d+_block\d+({'|'.join(_PAIR)})?")
_SQUEEZE_EXCITE = ("se_reduce", "se_expand")
_NORM_LEAVES = ("gamma", "beta", "moving_mean", "moving_variance")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One weight of a network.

    Attributes:
      block: Name of the block, or `HEAD`.
      part: Part of the block; an empty text for the head.
      leaf: Keras's name of the weight in its layer: "kernel", "gamma" and so on.
      layer: The layer.
    """

    block: str
    part: str
    leaf: str
    layer: keras.layers.Layer

    @property
    def variable(self) -> tf.Variable:
        """The weight itself."""
        return getattr(self.layer, self.leaf)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the weight in PyTorch."""
        return self._to_torch(np.broadcast_to(np.float32(0), tuple(self.variable.shape))).shape

    def read(self) -> np.ndarray:
        """The weight in PyTorch's order of axes. Of OABN, gamma is the clipped one that is in force."""
        if self.leaf == "gamma" and isinstance(self.layer, OutlierAwareBatchNormalization):
            return self.layer.effective_gamma().numpy()
        return self._to_torch(self.variable.numpy())

    def write(self, array: np.ndarray) -> None:
        """Sets the weight from an array in PyTorch's order of axes."""
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        self.variable.assign(array.reshape(self.variable.shape))

    def _to_torch(self, array):
        """HWIO to OIHW for convolutions, where I is 1 for depthwise ones; [in, out] to [out, in] for dense layers."""
        if self.leaf == "depthwise_kernel":
            array = array.reshape(*array.shape[:2], 1, -1)
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


@dataclasses.dataclass(frozen=True)
class Network:
    """The weights of a model, in order of execution.

    Attributes:
      kind: Kind of the blocks, in `models.BLOCKS`; in deploy form the family of the network, in `models.FAMILIES`.
      form: "training" or "deploy".
      slots: All weights that a checkpoint holds.
      strides: {name of a block: its stride}.
      other_layers: Names of further layers with weights.
    """

    kind: str
    form: str
    slots: tuple[Slot, ...]
    strides: dict[str, int]
    other_layers: tuple[str, ...] = ()

    @property
    def has_head(self) -> bool:
        """Whether the network ends in the layer of the logits."""
        return any(slot.block == HEAD for slot in self.slots)


def find_slots(model: keras.Model) -> Network:
    """Finds the weights of a model that computes what PyTorch computes with them.

    Args:
      model: Model with the names of `tf_repvgg.models`, in training form or fused.

    Raises:
      ValueError: If the model has no such names, or with the same weights PyTorch would compute something else:
        another padding, epsilon or activation.
    """
    leaves = graph.leaves(model) if graph.is_functional(model) else []
    blocks = [layer for layer in leaves if isinstance(layer, ReparameterizedBlock)]
    network = _read_training_form(blocks) if blocks else _read_deploy_form(model, leaves)
    head = next((layer for layer in leaves if layer.name == HEAD and type(layer) is keras.layers.Dense), None)
    slots = [*network.slots, *(_list_slots(HEAD, "", head) if head is not None else ())]
    layers = {id(slot.layer) for slot in slots} | {id(block) for block in blocks}
    others = tuple(layer.name for layer in leaves if layer.weights and id(layer) not in layers)
    return dataclasses.replace(network, slots=tuple(slots), other_layers=others)


def _list_parts(block):
    for name in block.get_convolutions():
        yield from (name, name.replace("conv", "norm"))
    yield from ("norm_identity", "norm_sum")


def _read_training_form(blocks):
    names = {block_class: name for name, block_class in BLOCKS.items()}
    kinds = set()
    slots: list[Slot] = []
    for block in blocks:
        if not _BLOCK_NAME.fullmatch(block.name):
            raise ValueError(
                f"block {block.name!r} has no counterpart in a PyTorch checkpoint; name blocks as build_repvgg does: "
                "stem, stage1_block1, stage1_block2 and so on"
            )
        if type(block) not in names:
            raise ValueError(f"block {block.name!r} is a {type(block).__name__}, which no known layout has")
        kinds.add(names[type(block)])
        layers = {part: getattr(block, part, None) for part in _list_parts(block)}
        if block.squeeze_excite is not None:
            layers |= zip(_SQUEEZE_EXCITE, (block.squeeze_excite.reduce, block.squeeze_excite.expand), strict=True)
        _check_block(block)
        for part, layer in layers.items():
            if layer is not None:
                slots += _list_slots(block.name, part, layer)
    if len(kinds) > 1:
        raise ValueError(f"the model mixes blocks of the kinds {', '.join(sorted(kinds))}; no known layout does")
    return Network(kinds.pop(), "training", tuple(slots), {block.name: block.strides for block in blocks})


def _check_block(block):
    """Refuses a block that computes something else than PyTorch does with the same weights."""
    if block.padding != "symmetric" and not _centres_like_torch(block, block.strides, block.kernel_size):
        raise ValueError(_explain_padding(block.name))
    _check_activation(block.name, block.activation)
    if block.dilation_rate != 1:
        raise ValueError(f"block {block.name!r} has a dilation rate of {block.dilation_rate}; no known layout has one")
    if getattr(block, "identity", "norm") == "constant":
        raise ValueError(f"block {block.name!r} has a constant identity branch, which no known layout has")
    for layer in graph.find_layers(block, keras.layers.BatchNormalization):
        if not np.isclose(layer.epsilon, TORCH_EPSILON, rtol=1e-6, atol=0):
            raise ValueError(
                f"batch normalizations of block {block.name!r} have the epsilon {layer.epsilon:g}, PyTorch's have "
                f"{TORCH_EPSILON:g}; build the model with epsilon={TORCH_EPSILON:g} (--bn_epsilon)"
            )


def _centres_like_torch(layer, stride, kernel_size):
    """Whether "same" padding puts as many rows in front as PyTorch: with stride 1, or at certain fixed input sizes."""

    def count_rows_in_front(size):  # as TensorFlow does
        return max((-(-size // stride) - 1) * stride + kernel_size - size, 0) // 2

    sizes = layer.input_shape[1:3]
    return 1 in (stride, kernel_size) or all(
        size is not None and count_rows_in_front(size) == kernel_size // 2 for size in sizes
    )


def _explain_padding(name):
    return (
        f"{name!r} pads as Keras does, PyTorch pads symmetrically: with stride 2 the outputs would differ; build the "
        "model with padding='symmetric' (--padding=symmetric)"
    )


def _check_activation(name, activation):
    if activation is not keras.activations.relu:
        raise ValueError(
            f"{name!r} has the activation {getattr(activation, '__name__', activation)!r}; networks of the known "
            "layouts have ReLU there"
        )


def _read_deploy_form(model, leaves):
    by_name = {layer.name: layer for layer in leaves}
    convolutions = [layer for layer in leaves if _BLOCK_NAME.fullmatch(layer.name)]
    if not convolutions:
        raise ValueError(
            f"model {model.name!r} has no layers named stem, stage1_block1 and so on, as networks of build_repvgg and "
            "their fused forms have; weights cannot be assigned to its layers"
        )
    slots: list[Slot] = []
    for conv in convolutions:
        name = conv.name
        if type(conv) not in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D):
            raise ValueError(
                f"layer {name!r} is a {type(conv).__name__}; weights of PyTorch belong in the float network, before it "
                "is quantized"
            )
        _check_convolution(conv, by_name)
        slots += _list_slots(name, MERGED, conv)
        for part in _SQUEEZE_EXCITE:
            if (layer := by_name.get(f"{name}_{part}")) is not None:
                slots += _list_slots(name, part, layer)
    kind = "mobileone" if any(conv.name.endswith(_PAIR) for conv in convolutions) else "repvgg"
    return Network(kind, "deploy", tuple(slots), {conv.name: conv.strides[0] for conv in convolutions})


def _check_convolution(conv, by_name):
    """Refuses a merged convolution that computes something else than PyTorch's does with the same weights."""
    padding = by_name.get(f"{conv.name}_padding")
    (kernel_size, _), (stride, _) = conv.kernel_size, conv.strides
    margin = (kernel_size // 2,) * 2
    is_padded = padding is not None and padding.padding == (margin, margin) and conv.padding == "valid"
    if not is_padded and not (conv.padding == "same" and _centres_like_torch(conv, stride, kernel_size)):
        raise ValueError(_explain_padding(conv.name))
    activation = by_name.get(f"{conv.name}_activation", conv)
    _check_activation(activation.name, activation.activation)
    if conv.dilation_rate != (1, 1):
        raise ValueError(f"layer {conv.name!r} has a dilation rate of {conv.dilation_rate}; no known layout has one")


def _list_slots(block: str, part: str, layer: keras.layers.Layer) -> Iterator[Slot]:
    leaves: tuple[str, ...] = ("kernel", "bias")
    if isinstance(layer, keras.layers.BatchNormalization):
        leaves = _NORM_LEAVES
    elif isinstance(layer, keras.layers.DepthwiseConv2D):
        leaves = ("depthwise_kernel", "bias")
    elif not layer.use_bias:
        leaves = ("kernel",)
    return (Slot(block, part, leaf, layer) for leaf in leaves)
