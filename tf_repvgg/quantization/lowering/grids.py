"""Keeping apart the grids of tensors that the converter would otherwise give one grid."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import IDENTITIES, RANGE_PRESERVING, SHARING_GRID
from tf_repvgg.quantization.lowering.affine import Affine, apply_as_convolution

# Of the layers that preserve the range, those that are operators in a file.
_OPERATORS = tuple(layer_class for layer_class in RANGE_PRESERVING if layer_class not in IDENTITIES)


def find_tied_layers(model: keras.Model) -> set[str]:
    """Names of layers whose outputs the converter would round on the grid of a concatenation for all their readers.

    Layers such as pooling have no grid of their own. If a concatenation reads one, the converter moves its output to
    the grid of the concatenation, and whatever else reads it gets that too, with values clipped to a foreign range.

    Args:
      model: Functional model without nested models.
    """
    readers: dict[str, list[keras.layers.Layer]] = {}
    for node in graph.nodes(model):
        for key in node.flat_input_ids:
            readers.setdefault(key, []).append(node.layer)
    return {
        node.layer.name
        for node in graph.nodes(model)
        for key in node.flat_output_ids
        if isinstance(node.layer, _OPERATORS)
        and graph.count_uses(model, key) > 1
        and any(isinstance(reader, SHARING_GRID) for reader in readers.get(key, ()))
    }


def untie(layer: keras.layers.Layer, tied: set[str]) -> Callable:
    """A copy of a layer such as Concatenate that reads outputs of tied layers through convolutions that do nothing.

    Args:
      layer: Layer that has its inputs on the grid of its output.
      tied: Names of layers, see `find_tied_layers`.
    """
    copy = graph.copy_layer(layer)
    moved: dict[int, Any] = {}

    def move(tensor: Any) -> Any:
        source = tensor.node.layer.name
        if source in tied and id(tensor) not in moved:
            name = f"{source}_for_{layer.name}{len(moved) or ''}"
            moved[id(tensor)] = apply_as_convolution(tensor, Affine.identity(tensor.shape[-1]), name)
        return moved.get(id(tensor), tensor)

    return lambda inputs, **_: copy(tf.nest.map_structure(move, inputs))
