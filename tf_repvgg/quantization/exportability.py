"""Whether an integer file can compute every operation of a model; asked before work begins."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg import converter, fusion, graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import quantize_activations, quantizers, relu_name
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, QuantizedDepthwiseConv2D
from tf_repvgg.quantization.shared_grids import run_on_shared_grids

# Layers that need no trial, in any order: their activations must be among the names below.
_KNOWN_LAYERS = (
    keras.layers.Add,
    keras.layers.AveragePooling2D,
    keras.layers.Concatenate,
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.InputLayer,
    keras.layers.LeakyReLU,
    keras.layers.MaxPooling2D,
    keras.layers.Multiply,
    keras.layers.Reshape,
    keras.layers.Softmax,
    keras.layers.SpatialDropout2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
    QuantizedDepthwiseConv2D,  # as lowering makes it of constants
    *WEIGHTED_LAYERS,
)
_KNOWN_ACTIVATIONS = ("linear", "relu", "relu6", "sigmoid", "softmax", "tanh", "swish", "leaky_relu", "exponential")
_TRIAL_SIZE = 64


def check_not_recurrent(model: keras.Model) -> None:
    """Refuses recurrent layers: TensorFlow's converter crashes, or fails, when it makes integer files of their loops.

    Args:
      model: Any Keras model.

    Raises:
      ValueError: If there is a recurrent layer. The message names it.
    """
    for layer in graph.find_layers(model, keras.layers.RNN):
        raise ValueError(
            f"layer {layer.name!r} is a {type(layer).__name__}, and integer files of recurrent layers cannot be "
            "written; use convolutions or attention over time"
        )


def check_exportable(model: keras.Model, activation_bits: int = 8) -> None:
    """Refuses a model with an operation that an integer file cannot compute.

    A model of the most usual layers is accepted as it is. Any other is converted on trial, with arbitrary ranges; its
    weights do not matter.

    Args:
      model: Functional model, in deploy form or with blocks in training form.
      activation_bits: Bits of activations, 8 or 16.

    Raises:
      ValueError: If a file of the model would compute in float somewhere. The message names the layer.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.exportability import check_exportable
      >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2), keras.layers.Softmax()])
      >>> check_exportable(model)
      >>> model.add(keras.layers.Lambda(keras.activations.softplus, name="softplus"))
      >>> try:
      ...     check_exportable(model)
      ... except ValueError as error:
      ...     print(str(error).partition(",")[0])
      layer 'softplus' (Lambda) has no integer form in TFLite
    """
    check_not_recurrent(model)
    if activation_bits == 8 and all(_is_known(layer) for layer in graph.leaves(model)):
        return
    deploy = fusion.fuse(model) if graph.find_layers(model, ReparameterizedBlock) else model
    trial = quantize_activations(deploy, bits=activation_bits)
    for quantizer in quantizers(trial):
        if quantizer.fixed_range is None:
            quantizer.set_range(-1.0, 1.0)
    shapes = [[_TRIAL_SIZE if size is None else size for size in tensor.shape[1:]] for tensor in trial.inputs]
    inference_type = tf.int8 if activation_bits == 8 else tf.int16
    file = converter.run(
        converter.make_integer_converter(trial, shapes, activation_bits, inference_type, run_on_shared_grids)
    )
    if names := converter.find_float_tensors(file):
        raise ValueError(
            f"{_describe_layer(trial, names)} has no integer form in TFLite, and the file would compute it in float; "
            "use another activation, such as ReLU, ReLU6, swish, sigmoid or tanh, or plain layers in place of it"
        )

    if error := converter.find_load_error(file):
        raise ValueError(f"{model.name!r} has no integer file: {error}")


def _is_known(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.ReLU):
        return relu_name(layer) is not None
    if isinstance(layer, ReparameterizedBlock):
        return layer.se_reduction is None and _has_known_activation(layer)
    if type(layer) is keras.layers.Activation:
        return _has_known_activation(layer)
    return type(layer) in _KNOWN_LAYERS and _has_known_activation(layer)


def _has_known_activation(layer: Any) -> bool:
    return getattr(getattr(layer, "activation", keras.activations.linear), "__name__", None) in _KNOWN_ACTIVATIONS


def _describe_layer(model, tensor_names):
    """The first layer in whose scope one of the tensors is computed."""
    scopes = {scope for name in tensor_names for part in name.split(";") for scope in part.split("/")}
    layers = [node.layer for node in graph.nodes(model) if node.layer.name in scopes]
    # A quantizer is in float because of the operation before it.
    layers.sort(key=lambda layer: isinstance(layer, ActivationQuantizer))
    return f"layer {layers[0].name!r} ({type(layers[0]).__name__})" if layers else f"the operation {tensor_names[0]!r}"
