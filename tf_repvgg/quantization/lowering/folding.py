"""Folding factors and offsets of channels into the layers with weights before or after them."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import IDENTITIES, SHARING_GRID
from tf_repvgg.quantization.lowering.affine import Affine, ChannelAffine, apply_as_convolution
from tf_repvgg.quantization.lowering.grids import find_tied_layers, untie
from tf_repvgg.quantization.quantized_layers import arrange_kernel, is_quantizable, restore_kernel

# Means and copies within a channel, which let factors and offsets pass.
_MEANS = (
    keras.layers.AveragePooling2D,
    keras.layers.Cropping2D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.UpSampling2D,
)
_MAXIMA = (keras.layers.GlobalMaxPooling2D, keras.layers.MaxPooling2D)
_REORDERINGS = (keras.layers.Flatten, keras.layers.Permute, keras.layers.Reshape)
# A kernel takes factors that differ by more than this only if they are its output channels': as factors of input
# channels they would spread the weights of an output channel, which share one grid.
_LARGEST_SPREAD = 2.0
# With a larger offset, the kernel would meet inputs whose mean is far from zero, where rounding it to few bits shifts
# the outputs.
_LARGEST_OFFSET = 1.0


class Fold(NamedTuple):
    """What a layer with weights takes over from its neighbors.

    Attributes:
      before: Function of its input channels, or None.
      after: Function of its output channels, or None.
    """

    before: Affine | None = None
    after: Affine | None = None


def fold(model: keras.Model) -> tuple[keras.Model, dict[str, Fold]]:
    """Copies a model, with every `ChannelAffine` folded into weights or, where it cannot be, as a convolution.

    A function right after a linear layer with weights goes into that layer's kernel and bias. Else, if only layers with
    weights read it, it goes into theirs; but an offset that is large stays, or any before a
    convolution that pads with zeros.

    Args:
      model: Functional model without nested models.

    Returns:
      The copy; and what each layer with weights took over, by its name.
    """
    plan = _Plan(model)
    plan.fold_into_layers_before()
    plan.fold_into_readers()

    def replace(layer) -> Callable:
        if isinstance(layer, ChannelAffine):
            affine = plan.affines.get(id(layer))
            if affine is None:
                return lambda inputs: inputs
            return lambda inputs: apply_as_convolution(inputs, affine, layer.name)
        if (folded := plan.folds.get(id(layer))) is not None:
            weights = fold_weights(layer, folded)
            return graph.copy_layer(layer, weights, use_bias=len(weights) > 1)
        return graph.copy_layer(layer)

    by_name = {layer.name: plan.folds[id(layer)] for layer in model.layers if id(layer) in plan.folds}
    result = graph.rebuild(model, replace)
    if tied := find_tied_layers(result):  # only now: functions that went elsewhere stood between layers
        result = graph.rebuild(
            result, lambda layer: untie(layer, tied) if isinstance(layer, SHARING_GRID) else graph.copy_layer(layer)
        )
    return result, by_name


def fold_weights(layer: keras.layers.Layer, folded: Fold) -> list[np.ndarray]:
    """Kernel, and bias if it needs one, of a layer that computes what the layer and the functions around it compute.

    Args:
      layer: Conv2D, Conv2DTranspose, DepthwiseConv2D or Dense layer with its weights.
      folded: Functions to take over. A grouped convolution takes uniform functions before it only.
    """
    weights, *bias = (weight.astype(np.float64) for weight in layer.get_weights())
    kernel = arrange_kernel(layer, weights).numpy()
    offset = bias[0] if bias else np.zeros(kernel.shape[-1])
    if folded.before is not None:
        # A grouped convolution has fewer weights than inputs along this axis; its factors are all the same.
        factor, shift = (values[: kernel.shape[-2], np.newaxis] for values in folded.before)
        if isinstance(layer, keras.layers.DepthwiseConv2D):  # some output channels for each input channel
            factor, shift = (np.repeat(values, weights.shape[-1]) for values in folded.before)
        offset = offset + (kernel * shift).sum(tuple(range(kernel.ndim - 1)))
        kernel = kernel * factor
    if folded.after is not None:
        kernel = kernel * folded.after.factor
        offset = offset * folded.after.factor + folded.after.offset
    weights = [restore_kernel(layer, kernel).numpy(), *([offset] if bias or np.any(offset) else [])]
    return [weight.astype(np.float32) for weight in weights]


class _Plan:
    """Where every function of a model goes."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._nodes = graph.nodes(model)
        self._sources = {key: node for node in self._nodes for key in node.flat_output_ids}
        self._readers = collections.defaultdict(list)
        for node in self._nodes:
            for key in node.flat_input_ids:
                self._readers[key].append(node)
        self._outputs = graph.output_keys(model)
        self._calls = collections.Counter(id(node.layer) for node in self._nodes)
        self.affines = {id(node.layer): node.layer.affine for node in self._nodes if _is_affine(node)}
        self.folds: dict[int, Fold] = {}

    def fold_into_layers_before(self) -> None:
        for node in filter(_is_affine, self._nodes):
            affine = self.affines[id(node.layer)]
            for source, affine_there in self._walk_back(node, affine):
                if _is_affine(source) and id(source.layer) in self.affines:
                    self.affines[id(source.layer)] = self.affines[id(source.layer)].then(affine_there)
                elif self._is_foldable(source) and source.layer.activation is keras.activations.linear:
                    folded = self.folds.get(id(source.layer), Fold())
                    after = affine_there if folded.after is None else folded.after.then(affine_there)
                    self.folds[id(source.layer)] = folded._replace(after=after)
                else:
                    continue
                del self.affines[id(node.layer)]
                break

    def fold_into_readers(self) -> None:
        for node in reversed(list(filter(_is_affine, self._nodes))):
            if id(node.layer) not in self.affines:
                continue
            affine = self.affines[id(node.layer)]
            places = self._find_places(node, affine)
            if places is None:
                continue
            for reader, affine_there in places:
                if _is_affine(reader):
                    self.affines[id(reader.layer)] = affine_there.then(self.affines[id(reader.layer)])
                    continue
                folded = self.folds.get(id(reader.layer), Fold())
                before = affine_there if folded.before is None else affine_there.then(folded.before)
                self.folds[id(reader.layer)] = folded._replace(before=before)
            del self.affines[id(node.layer)]

    def _walk_back(self, node, affine) -> Iterator[tuple[Any, Affine]]:
        """Yields (node, function) for each node before this one, as far as the function can be applied there."""
        (key,) = node.flat_input_ids
        while len(self._readers[key]) == 1 and key not in self._outputs and key in self._sources:
            source = self._sources[key]
            if self._calls[id(source.layer)] > 1:
                return
            yield source, affine
            moved = self._pass_dropped(source, affine) or _move_before(source, affine)
            if moved is None or len(source.flat_input_ids) != 1:
                return
            affine = moved
            (key,) = source.flat_input_ids

    def _find_places(self, node, affine) -> list[tuple[Any, Affine]] | None:
        """The readers that together take over a function; None if one of them cannot."""
        (key,) = node.flat_output_ids
        if key in self._outputs or not self._readers[key]:
            return None
        places = []
        for reader in self._readers[key]:
            if self._calls[id(reader.layer)] > 1 or self._readers[key].count(reader) > 1:
                return None
            is_affine = _is_affine(reader) and id(reader.layer) in self.affines
            if is_affine or (self._is_foldable(reader) and _takes_before(reader.layer, affine)):
                places.append((reader, affine))
            else:
                moved = self._pass_dropped(reader, affine) or _move_after(reader, affine)
                further = None if moved is None else self._find_places(reader, moved)
                if further is None:
                    return None
                places += further
        return places

    def _pass_dropped(self, node, affine):
        return affine if _is_affine(node) and id(node.layer) not in self.affines else None

    def _is_foldable(self, node):
        layer = node.layer
        is_channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
        return is_quantizable(layer) and self._calls[id(layer)] == 1 and is_channels_last


def _is_affine(node):
    return isinstance(node.layer, ChannelAffine)


def _takes_before(layer, affine):
    """Whether the kernel of a layer can take over a function of its input."""
    factor = np.abs(affine.factor)
    if not affine.is_uniform and (getattr(layer, "groups", 1) > 1 or factor.max() > _LARGEST_SPREAD * factor.min()):
        return False
    if np.max(np.abs(affine.offset)) > _LARGEST_OFFSET:
        return False
    # How many pixels of its input a pixel of a transposed convolution's output reads differs from pixel to pixel.
    pads = getattr(layer, "padding", "valid") != "valid" and np.prod(layer.kernel_size) > 1
    varies = pads or isinstance(layer, keras.layers.Conv2DTranspose)
    return not (varies and np.any(affine.offset))


def _move_after(node, affine):
    """The function that does after a call of a layer what another one does before it; None if there is none."""
    if isinstance(node.layer, keras.layers.Multiply):
        if np.any(affine.offset):
            return None
        channels = node.output_shapes[-1]
        return affine if len(affine.factor) == channels else affine.resize(channels)
    return _move(node.layer, affine, node.output_shapes[-1])


def _move_before(node, affine):
    """The function that does before a call of a layer what another one does after it; None if there is none."""
    return _move(node.layer, affine, tf.nest.flatten(node.input_shapes)[-1])


def _move(layer, affine, channels):
    is_channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    if isinstance(layer, IDENTITIES):
        return affine
    if isinstance(layer, keras.layers.Reshape) and len(affine.factor) == channels:
        return affine  # the last axis is the same one
    if isinstance(layer, _REORDERINGS):
        return affine.resize(channels) if affine.is_uniform and channels is not None else None
    passes = (
        isinstance(layer, _MEANS)
        or (isinstance(layer, _MAXIMA) and np.all(affine.factor > 0))
        or (isinstance(layer, keras.layers.ZeroPadding2D) and not np.any(affine.offset))
    )
    return affine if passes and is_channels_last else None
