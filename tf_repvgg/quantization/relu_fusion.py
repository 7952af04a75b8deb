"""Which layers take over the ReLU after them: in a file, one operator computes both, and rounds after the ReLU only."""

import collections
from typing import Any

import tensorflow as tf

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS

# TensorFlow's operations that become operators with an activation of their own. The converter fuses a ReLU with them
# even if a quantizer stands in between, and drops the quantizer; it computes a ReLU after anything else by itself, and
# in float if no quantizer stands in between.
_FUSING_OPERATIONS = {"Add", "AddV2", "BiasAdd", "Conv2D", "DepthwiseConv2dNative", "MatMul", "Mul", "Sub"}


def fuses_relu(node: Any) -> bool:
    """Whether an integer file computes a layer and a ReLU right after it in one operator.

    Layers with weights do so, and all layers that end with a sum, a difference, a product, a convolution or a bias,
    layers of a user's own included: the layer is traced, and its last operation counts.

    Args:
      node: Keras node of a call of a layer without an activation.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> from tf_repvgg.quantization.relu_fusion import fuses_relu
      >>> inputs = keras.Input((8, 8, 3))
      >>> model = keras.Model(inputs, keras.layers.LeakyReLU()(keras.layers.Conv2D(4, 3)(inputs) + 1.0))
      >>> [fuses_relu(node) for node in graph.nodes(model)]
      [True, True, False]
    """
    if isinstance(node.layer, (*WEIGHTED_LAYERS, ReparameterizedBlock)):
        return True
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in node.keras_inputs]

    def call(*tensors):
        by_key = collections.defaultdict(list)
        for key, tensor in zip(node.flat_input_ids, tensors, strict=True):
            by_key[key].append(tensor)
        arguments, keywords = node.map_arguments(by_key)
        return graph.infer(node.layer)(*arguments, **keywords)

    outputs = tf.function(call, autograph=False).get_concrete_function(*specs).structured_outputs
    return {_find_last_operation(output) for output in tf.nest.flatten(outputs)} <= _FUSING_OPERATIONS


def _find_last_operation(tensor):
    """Type of the operation that computes a tensor of a traced function."""
    while tensor.op.type == "Identity":
        (tensor,) = tensor.op.inputs
    return tensor.op.type
