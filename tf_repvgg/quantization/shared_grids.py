"""Running a quantized model so that the converter sees the grid that a concatenation's inputs and output share."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import IDENTITIES, SHARING_GRID


def run_on_shared_grids(model: keras.Model, inputs: Sequence[Any]) -> Any:
    """Runs a quantized model, rounding what a Concatenate, Maximum or Minimum computes at once, and for good.

    The outputs are those of the model. The operators of these layers have one grid in a file, which is that of the
    output. But the converter moves a quantizer past the reshaping or transposition that follows; and then it takes the
    grid of an input that has a quantizer of its own, and clips all the others to it. Fake quantization with constant
    ranges, which the converter leaves where it is, prevents that.

    Args:
      model: Functional model with `ActivationQuantizer`s.
      inputs: Tensors in the order of `model.inputs`.

    Returns:
      The outputs, in the model's own structure.

    Example:
      >>> import tensorflow as tf
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import quantize_activations, quantizers
      >>> from tf_repvgg.quantization.shared_grids import run_on_shared_grids
      >>> inputs = [keras.Input([2]), keras.Input([2])]
      >>> model = keras.Model(inputs, keras.layers.Concatenate()(inputs))
      >>> quantized = quantize_activations(model)
      >>> for quantizer in quantizers(quantized):
      ...     quantizer.set_range(-2.0, 4.0)
      >>> values = [tf.constant([[-1.0, 1.01]]), tf.constant([[-2.0, 4.0]])]
      >>> [round(float(value), 2) for value in run_on_shared_grids(quantized, values)[0]]
      [-0.99, 1.01, -2.0, 4.0]
    """
    quantizers: dict[int, collections.deque[ActivationQuantizer | None]] = collections.defaultdict(collections.deque)
    for node, quantizer in _find_quantizers(model):
        quantizers[id(node.layer)].append(quantizer)

    def replace(layer) -> Callable:
        if isinstance(layer, ActivationQuantizer):
            return lambda tensor: _quantize(layer, tensor)
        run = graph.infer(layer)
        # `replay` calls a layer in the order of its nodes.
        quantizer = quantizers[id(layer)].popleft() if id(layer) in quantizers else None
        if quantizer is None:
            return run
        return lambda *arguments, **keywords: _quantize(quantizer, run(*arguments, **keywords), is_movable=False)

    return graph.replay(model, inputs, replace)


def _quantize(quantizer, tensor, is_movable=True):
    """Quantizes by constants, so that equal ranges give scales that are equal to the last bit.

    TensorFlow simplifies arithmetic on variables, and not always alike.
    """
    with tf.init_scope():
        minimum, maximum = map(float, quantizer.bounds())
    function = (
        tf.quantization.fake_quant_with_min_max_vars if is_movable else tf.quantization.fake_quant_with_min_max_args
    )
    with tf.name_scope(quantizer.name):
        values = tf.cast(tensor, tf.float32)
        outputs = function(values, minimum, maximum, num_bits=quantizer.bits, narrow_range=quantizer.bits == 16)
        return tf.cast(outputs, tensor.dtype)


def _find_quantizers(model):
    """(node, quantizer on whose grid its output is, or None) of each call of a layer that shares its grid.

    It is None, too, for a concatenation of nothing but outputs of quantizers. The converter gives that another grid,
    and refuses a constant one; but with nothing to write on the grid of an input, its file comes out right.
    """
    sources, readers = {}, collections.defaultdict(list)
    for node in graph.nodes(model):
        sources.update(dict.fromkeys(node.flat_output_ids, node))
        for key in node.flat_input_ids:
            readers[key].append(node)

    def is_rounded(key):
        node = sources.get(key)
        if node is not None and isinstance(node.layer, IDENTITIES):
            return is_rounded(node.flat_input_ids[0])
        return node is not None and isinstance(node.layer, ActivationQuantizer)

    def find_quantizer(node):
        for reader in (reader for key in node.flat_output_ids for reader in readers[key]):
            if isinstance(reader.layer, ActivationQuantizer):
                return reader.layer
            if isinstance(reader.layer, SHARING_GRID):
                return find_quantizer(reader)
        return None

    def is_left_alone(node):
        return isinstance(node.layer, keras.layers.Concatenate) and all(map(is_rounded, node.flat_input_ids))

    return [
        (node, None if is_left_alone(node) else find_quantizer(node))
        for node in graph.nodes(model)
        if isinstance(node.layer, SHARING_GRID)
    ]
