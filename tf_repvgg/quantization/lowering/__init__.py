"""Lowering: operations that integer files do not have become ones that they have."""

import collections

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion, graph
from tf_repvgg.quantization.lowering import layer_rules, operator_rules
from tf_repvgg.quantization.lowering.builder import Builder, Names
from tf_repvgg.quantization.lowering.folding import fold
from tf_repvgg.quantization.lowering.grids import find_tied_layers
from tf_repvgg.quantization.lowering.repetitions import ReluCalls

__all__ = ["lower"]

_TOLERANCE = 1e-3
# Readers of an integer input that turn it into numbers, and so take them as well.
_CASTS = (keras.layers.Normalization, keras.layers.Rescaling)


def lower(model: keras.Model) -> keras.Model:
    """Rewrites a fused model with operations that integer files have; the function stays, up to rounding in float32.

    Constants that multiply or are added, batch normalizations and rescalings among them, become part of the kernel and
    bias of the layer before or after, where that is exact, and otherwise a depthwise 1x1 convolution of 8-bit weights,
    one for each channel, that no method changes. Activations, averages, separable convolutions and layers of sequences
    become several layers each. The kernels of all other layers stay to be quantized, under the names they had.

    Args:
      model: Functional deploy-form model (see `tf_repvgg.fusion.fuse`). Blocks in training form stay as they are.

    Returns:
      A functional model without nested models; `model` itself if it holds nothing to rewrite. The statistics of a
      `tf_repvgg.fusion.FusedModel` stay, adapted to the constants that its convolutions took over. Inputs of integers
      that the model turns into float at once are float.

    Raises:
      ValueError: If the model is not functional, or the outputs on random input differ from those of `model`.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import lowering
      >>> inputs = keras.Input((8, 8, 3))
      >>> features = keras.layers.Conv2D(4, 3, name="conv")(inputs) * 0.5
      >>> lowered = lowering.lower(keras.Model(inputs, keras.layers.ReLU(4.0, name="relu")(features)))
      >>> [layer.name for layer in lowered.layers[1:]]
      ['conv', 'relu_relu6', 'relu']
    """
    if not graph.is_functional(model):
        raise ValueError(f"quantization needs a functional Keras 2 model, but got {type(model).__name__}")
    layer_names = graph.unique_names(model)
    names = Names(set(layer_names.values()))
    lowered_names = set()
    relu_calls = ReluCalls()

    def replace(layer):
        name = layer_names[id(layer)]
        copy = graph.copy_layer(layer, name=name)
        build = Builder(names, name)
        rules = operator_rules if operator_rules.is_operator(layer) else layer_rules
        replacement = rules.find_replacement(layer, build)
        if replacement is None:
            return relu_calls.share(layer, copy)

        def call(*arguments, **keywords):
            outputs = replacement(*arguments, **keywords)
            if outputs is None:
                return copy(*arguments, **keywords)
            lowered_names.add(name)
            return outputs

        return relu_calls.share(layer, call)

    lowered = graph.rebuild(model, replace, inline_nested=True, input_dtypes=_find_float_inputs(model))
    if not (lowered_names or relu_calls.is_any_shared or find_tied_layers(lowered)):
        return model
    statistics = fusion.pre_activation_statistics(model)
    lowered, folds = fold(lowered)
    try:
        fusion.check_same_outputs(model, lowered, _TOLERANCE, "lowering")
    except ArithmeticError as error:  # such as an exponential of random inputs, which overflows
        raise ValueError(f"{error}; write the model without the operations on constants, or report it to us") from None
    if not statistics:
        return lowered
    for name, folded in folds.items():
        entry = statistics.get(name)
        if entry is not None and folded.after is not None:
            factor, offset = folded.after
            statistics[name] = fusion.PreActivationStatistics(
                (entry.mean * factor + offset).astype(np.float32), (entry.variance * factor**2).astype(np.float32)
            )
    return graph.recast(lowered, fusion.FusedModel, statistics=statistics)


def _find_float_inputs(model):
    """{name of the input's layer: "float32"} of the inputs of integers that only casts to float read."""
    readers = collections.defaultdict(list)
    for node in graph.nodes(model):
        for key in node.flat_input_ids:
            readers[key].append(node)
    return {
        tensor.node.layer.name: "float32"
        for tensor in model.inputs
        if tensor.dtype.is_integer and readers[str(id(tensor))] and all(map(_is_cast, readers[str(id(tensor))]))
    }


def _is_cast(node):
    is_operator = operator_rules.is_operator(node.layer) and node.layer.symbol == "cast"
    return (is_operator or type(node.layer) in _CASTS) and tf.nest.flatten(node.outputs)[0].dtype == "float32"
