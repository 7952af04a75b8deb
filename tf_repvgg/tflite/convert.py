"""Running TensorFlow's converter on a fused Keras model; `weights` then writes the exact codes into its file."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg import native_output
from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.checks import check_fused, validate_images
from tf_repvgg.quantization.uniform import QuantizedKernel
from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.weights import with_weights

INFERENCE_TYPES = {"int8": tf.int8, "uint8": tf.uint8, "int16": tf.int16, "float32": tf.float32}
_INFERENCE_TYPES_OF_BITS = {8: ("int8", "uint8", "float32"), 16: ("int16", "float32")}


def convert(
    model: keras.Model,
    calibration: Iterable[np.ndarray] | None = None,
    per_channel: bool = True,
    inference_type: str | None = None,
    weight_bits: int = 8,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Writes a fused model as a fully integer file: int8 activations and weights, integer biases, batch 1.

    A quantized model, one that holds `ActivationQuantizer`s, needs no calibration: the file has its calibration ranges,
    and int16 activations if they have 16 bits. For any other model the ranges are the smallest and the largest
    values on the calibration images. Weights are written by `with_weights`.

    Args:
      model: Deploy-form model with one input (see `tf_repvgg.fusion.fuse`).
      calibration: Normalized float images, each [height, width, channels]; None for a quantized model, whose input must
        then have a fixed size.
      per_channel: Whether each output channel has a weight scale of its own; otherwise each tensor has one.
      inference_type: Type of input and output: "int8", "uint8" or "float32", or for int16 activations "int16" or
        "float32"; by default the type of the activations.
      weight_bits: Bits of the uniform weight grid, from 2 to 8; stored in int8.
      kernels: {layer name: codes and scales} of layers that are quantized already; see `with_weights`.
      metadata: JSON-serializable content to store in the file under the name TF_REPVGG_INPUT, such as the
        preprocessing that the model expects and the names of its classes.

    Returns:
      The file.

    Raises:
      ValueError: If the model is not fused or has several inputs, the inference type or the bits are unknown, or
        calibration images are missing, of another shape, not finite, or given for a quantized model; or if an
        activation of a quantized model has no range.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> images = np.random.default_rng(0).uniform(-1, 1, [16, 8, 8, 3])
      >>> file = tflite.convert(model, images, weight_bits=4)
      >>> [operator.name for operator in tflite.operators(file)], int(tflite.weight_codes(file)[0].codes.max())
      (['CONV_2D'], 7)
    """
    inference_type = resolve_inference_type(inference_type, activation_bits(model))
    check_fused(model)
    if len(model.inputs) != 1:
        raise ValueError(f"files are written for models of one input, and {model.name!r} has {len(model.inputs)}")
    if quantizers(model):
        _check_quantized(model, calibration)
        file = _run_converter(model, model.input_shape[1:], inference_type)
        _check_integer(file)
    else:
        images = validate_images(() if calibration is None else calibration, model.input_shape)
        file = _run_converter(model, images[0].shape[1:], inference_type, images)
    return with_weights(file, model, weight_bits, per_channel, kernels, metadata)


def activation_bits(model: keras.Model) -> int:
    """Bits of the activations in a model's file: those of its quantizers; 8 if it has none.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> quantized = ptq.quantize(model, calibration=np.ones([1, 8, 8, 3]), activation_bits=16)
      >>> tflite.activation_bits(model), tflite.activation_bits(quantized)
      (8, 16)
    """
    return next((quantizer.bits for quantizer in quantizers(model)), 8)


def resolve_inference_type(inference_type: str | None, bits: int) -> str:
    """The type of input and output of a file.

    Args:
      inference_type: Requested type; None for the default.
      bits: Bits of the activations, 8 or 16.

    Raises:
      ValueError: If files with activations of so many bits cannot have that type.

    Example:
      >>> from tf_repvgg import tflite
      >>> tflite.resolve_inference_type(None, 8), tflite.resolve_inference_type("float32", 16)
      ('int8', 'float32')
    """
    known = _INFERENCE_TYPES_OF_BITS[bits]
    if inference_type not in (None, *known):
        raise ValueError(
            f"inference_type is {inference_type!r}; known for activations of {bits} bits: {', '.join(known)}"
        )
    return inference_type or known[0]


def _check_quantized(model, calibration):
    if calibration is not None:
        raise ValueError("the model holds its own calibration ranges; leave calibration out")
    _check_fixed_size(model)
    for quantizer in quantizers(model):
        if not np.all(np.isfinite(quantizer.range.numpy())):
            raise ValueError(f"{quantizer.name!r} has no range yet; train the model, or quantize it by a method of ptq")


def _check_fixed_size(model):
    if None in model.input_shape[1:]:
        raise ValueError(f"the model's input is {model.input_shape[1:]}; a file needs images of a fixed size")


def _check_integer(file):
    """Refuses a file that computes in float somewhere: an activation without a quantizer causes such a tensor."""
    flat = flatbuffer.unpack(file)
    for subgraph in flat.subgraphs:
        for operator in subgraph.operators:
            output = subgraph.tensors[operator.outputs[0]]
            if output.type == schema.TensorType.FLOAT32 and operator.outputs[0] not in subgraph.outputs:
                raise ValueError(
                    f"the file would compute {flatbuffer.tensor_name(output)!r} in float; put an ActivationQuantizer "
                    "after every operation, as tf_repvgg.quantization.quantize_activations does"
                )


def convert_float(model: keras.Model) -> bytes:
    """Writes a fused model as a float32 file of batch 1, the input of other quantization tools.

    Args:
      model: Deploy-form model for images of a fixed size.

    Raises:
      ValueError: If the model holds a block in training form, or its input has no fixed size.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> tflite.costs(tflite.convert_float(model)).weight_bytes == 4 * 3 * 3 * 3 * 4
      True
    """
    check_fused(model)
    _check_fixed_size(model)
    return _run_quietly(_make_converter(model, model.input_shape[1:]))


def _make_converter(model, image_shape):
    # A fixed batch of 1, for runtimes without dynamic shapes.
    function = tf.function(lambda image: model(image, training=False)).get_concrete_function(
        tf.TensorSpec((1, *image_shape), tf.float32, name="image")
    )
    # The variables that the function reads. Given the Keras model instead, TensorFlow would trace and save every layer.
    holder = tf.Module()
    holder.weights = model.weights
    return tf.lite.TFLiteConverter.from_concrete_functions([function], holder)


def _run_converter(model, image_shape, inference_type, images: Sequence[np.ndarray] | None = None):
    """Runs TensorFlow's own integer conversion; only the grid of the weights is not the final one."""
    converter = _make_converter(model, image_shape)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if images is not None:
        converter.representative_dataset = lambda: ([image] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if activation_bits(model) == 16:
        int16 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [int16]
    converter.inference_input_type = converter.inference_output_type = INFERENCE_TYPES[inference_type]
    return _run_quietly(converter)


def _run_quietly(converter):
    with warnings.catch_warnings(), native_output.hide():
        warnings.simplefilter("ignore")
        return converter.convert()
