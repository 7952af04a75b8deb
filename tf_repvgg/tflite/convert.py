"""From a fused Keras model to a fully integer TFLite file whose weights are exactly the codes asked for."""

import json
import warnings
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg import graph, native_output
from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.checks import check_fused, validate_images
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, QuantizedLayer, bias_of, kernel_of
from tf_repvgg.quantization.uniform import MAX_BIAS_CODE, QuantizedKernel, min_scale_of_bias, quantize_min_max
from tf_repvgg.tflite import flatbuffer

INFERENCE_TYPES = {"int8": tf.int8, "uint8": tf.uint8, "int16": tf.int16, "float32": tf.float32}
_INFERENCE_TYPES_OF = {8: ("int8", "uint8", "float32"), 16: ("int16", "float32")}  # by activation bits
METADATA_NAME = "TF_REPVGG_INPUT"
# The converter gives an activation that is zero on every calibration image a range of +-1e-6. With scales that far from
# their neighbours' XNNPACK refuses to load the file.
_DEAD_SCALE = 1e-8
_NOMINAL_SCALE = 2.0**-7
_FIXED_SCALE_16 = 2.0**-15
# Of a kernel's largest weight; far below the 1 / 254 that rounding to 8 bits may move a weight by.
_ROUNDING = 1e-6


def convert(
    model: keras.Model,
    calibration=None,
    per_channel: bool = True,
    inference_type: str | None = None,
    weight_bits: int = 8,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping | None = None,
) -> bytes:
    """Writes a fused model as a fully integer file: int8 activations and weights, integer biases, batch 1.

    A quantized model, one that holds `ActivationQuantizer`s, needs no calibration: the file has its ranges, and int16
    activations where they have 16 bits. Of any
    other, activation ranges are the smallest and largest values seen on the calibration images. Weights are those of
    `with_weights`.

    Args:
      model: deploy-form model with one input (see `tf_repvgg.fusion.fuse`).
      calibration: iterable of normalised float images [height, width, channels], without a batch dimension; None for
        a quantized model, whose input must then have a known size.
      per_channel: one weight scale per output channel, or one per tensor.
      inference_type: type of input and output: that of the activations by default; "int8", "uint8" or "float32", or of
        int16 activations "int16" or "float32".
      weight_bits: 2 to 8: of the uniform weight grid, stored in int8.
      kernels: codes and scales by layer name, for layers that are already quantized. A DepthwiseConv2D's codes
        have shape [height, width, 1, channels * depth multiplier].
      metadata: JSON-serializable facts to store in the file under the name TF_REPVGG_INPUT, such as the
        preprocessing that the model expects and the names of its classes.

    Returns:
      The bytes of the file.

    Raises:
      ValueError: for a model that is not fused or has several inputs, an unknown inference type, bits out of range,
        calibration images that are none, of another shape, or not finite, or given for a quantized model; and for a
        quantized model with an activation that has no range.
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
    """The bits of activations in a model's file: those of its quantizers; 8 where it has none."""
    return next((quantizer.bits for quantizer in quantizers(model)), 8)


def resolve_inference_type(asked: str | None, bits: int) -> str:
    """The type of input and output that a file with activations of so many bits has: that asked for, or its default.

    Raises:
      ValueError: if there is no such file.
    """
    known = _INFERENCE_TYPES_OF[bits]
    if asked not in (None, *known):
        raise ValueError(f"inference_type is {asked!r}; known for activations of {bits} bits: {', '.join(known)}")
    return asked or known[0]


def _check_quantized(model, calibration):
    if calibration is not None:
        raise ValueError("the model holds its own activation ranges; leave calibration out")
    if None in model.input_shape[1:]:
        raise ValueError(f"the model's input is {model.input_shape[1:]}; a file needs a fixed size of images")
    for quantizer in quantizers(model):
        if not np.all(np.isfinite(quantizer.range.numpy())):
            raise ValueError(f"{quantizer.name!r} has no range yet; train the model, or quantize it by a method of ptq")


def _check_integer(file):
    """Refuses a file that computes in float somewhere: an activation without a quantizer leaves such a tensor."""
    flat = flatbuffer.unpack(file)
    for subgraph in flat.subgraphs:
        for operator in subgraph.operators:
            output = subgraph.tensors[operator.outputs[0]]
            if output.type == schema.TensorType.FLOAT32 and operator.outputs[0] not in subgraph.outputs:
                raise ValueError(
                    f"the file would compute {output.name.decode()!r} in float; put an ActivationQuantizer after every "
                    "operation, as tf_repvgg.quantization.quantize_activations does"
                )


def convert_float(model: keras.Model) -> bytes:
    """Writes a fused model as a float32 file of batch 1: what other quantization tools start from.

    Raises:
      ValueError: if the model holds a block in training form, or takes images of no fixed size.
    """
    check_fused(model)
    if None in model.input_shape[1:]:
        raise ValueError(f"the model's input is {model.input_shape[1:]}; a file needs a fixed size of images")
    with warnings.catch_warnings(), native_output.hide():
        warnings.simplefilter("ignore")
        return _make_converter(model, model.input_shape[1:]).convert()


def _make_converter(model, image_shape):
    # A fixed batch of 1: what runtimes without dynamic shapes need.
    function = tf.function(lambda image: model(image, training=False)).get_concrete_function(
        tf.TensorSpec((1, *image_shape), tf.float32, name="image")
    )
    # All that the function reads; with the Keras model in its place, every layer would be traced and saved once more.
    holder = tf.Module()
    holder.weights = model.weights
    return tf.lite.TFLiteConverter.from_concrete_functions([function], holder)


def _run_converter(model, image_shape, inference_type, images=None):
    """TensorFlow's own integer conversion: right in everything but the weights' grid."""
    converter = _make_converter(model, image_shape)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if images is not None:
        converter.representative_dataset = lambda: ([image] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if activation_bits(model) == 16:
        int16 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [int16]
    converter.inference_input_type = converter.inference_output_type = INFERENCE_TYPES[inference_type]
    with warnings.catch_warnings(), native_output.hide():
        warnings.simplefilter("ignore")
        return converter.convert()


def with_weights(
    file: bytes,
    model: keras.Model,
    weight_bits: int = 8,
    per_channel: bool = True,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping | None = None,
) -> bytes:
    """Puts a model's weights and biases into a calibrated int8 file of that model, code for code.

    Layers named in `kernels` get exactly those codes and scales, quantized layers their own; all others are rounded by
    `quantize_min_max`, but for kernels that are 8-bit codes times one scale already: they keep them.
    Biases are int32, or int64 where activations are int16, with scale (input scale * weight scale). Arguments as for
    `convert`.

    Raises:
      ValueError: if an operator of the file has no counterpart in the model, a layer's weights cannot be put on the
        grid, `kernels` names no layer of the model, or several, or has another shape, or given codes leave no room
        for a bias.
    """
    flat = flatbuffer.unpack(file)
    kernels = _own_kernels(model) | dict(kernels or {})
    layers = graph.find_layers(model, WEIGHTED_LAYERS)
    _check_supported(model, weight_bits)
    _check_given(kernels, layers)
    for subgraph in flat.subgraphs:
        _widen_dead_activations(flat, subgraph)
        _mend_16_bit_activations(flat, subgraph)
        for layer, layout, operators in _shared_weights(flat, subgraph, layers):
            input_scales = [subgraph.tensors[operator.inputs[0]].quantization.scale[0] for operator in operators]
            bias = bias_of(layer)
            if layer.name in kernels:
                quantized = kernels[layer.name]
            else:
                floor = min_scale_of_bias(bias, min(input_scales))
                quantized = _quantize_kernel(kernel_of(layer), weight_bits, per_channel, floor)
            weights = flatbuffer.weights_tensor(subgraph, operators[0])
            flatbuffer.set_weights(flat, weights, layout, quantized.codes, quantized.scale)
            for operator, input_scale in zip(operators, input_scales, strict=True):
                bias_scale = input_scale * quantized.scale
                codes = _bias_codes(layer, bias, bias_scale)
                flatbuffer.set_bias(flat, subgraph, operator, codes, bias_scale)
    if metadata is not None:
        flatbuffer.set_metadata(flat, METADATA_NAME, json.dumps(metadata).encode())
    flatbuffer.drop_unused_buffers(flat)
    return flatbuffer.pack(flat)


def _quantize_kernel(kernel, weight_bits, per_channel, floor):
    if weight_bits == 8:
        # Of a `ClusterableLayer` of the user's own, say, whose weights are on a grid that no variable tells of.
        one_grid = quantize_min_max(kernel, per_channel=False, min_scale=floor)
        if np.allclose(one_grid.dequantize(), kernel, rtol=0, atol=_ROUNDING * np.max(np.abs(kernel), initial=0)):
            return one_grid
    return quantize_min_max(kernel, weight_bits, per_channel, min_scale=floor)


def _own_kernels(model):
    layers = graph.find_layers(model, QuantizedLayer)
    return {layer.name: layer.quantized_kernel() for layer in layers}


def _widen_dead_activations(flat, graph):
    """Gives activations that calibration found to be zero throughout a scale that runtimes can work with."""
    for tensor in graph.tensors:
        scale = tensor.quantization.scale if tensor.quantization is not None else None
        is_constant = flat.buffers[tensor.buffer].data is not None
        if not is_constant and scale is not None and len(scale) and scale[0] < _DEAD_SCALE:
            tensor.quantization.scale = np.float32([_NOMINAL_SCALE])


def _mend_16_bit_activations(flat, graph):
    """Gives int16 sigmoids and tanhs the grid that their kernels insist on; the converter writes an unsigned one."""
    for operator in graph.operators:
        output = graph.tensors[operator.outputs[0]]
        code = flatbuffer.operator_code(flat, operator)
        has_fixed_scale = code in (schema.BuiltinOperator.LOGISTIC, schema.BuiltinOperator.TANH)
        if has_fixed_scale and output.type == schema.TensorType.INT16:
            output.quantization.scale, output.quantization.zeroPoint = np.float32([_FIXED_SCALE_16]), np.int64([0])


def _shared_weights(flat, graph, layers):
    """[(layer, layout of its weights, the operators that run it)], each layer with a weight tensor of its own.

    A layer that is called twice stays two operators on one tensor; layers with equal kernels, which the converter lets
    share a tensor, are parted: their biases, or codes given for one of them, may ask for another scale.
    """
    found, owners = {}, {}
    for operator in graph.operators:
        if (layout := flatbuffer.weights_layout(flat, operator)) is None:
            continue
        weights = flatbuffer.weights_tensor(graph, operator)
        layer = _layer_of(flat, weights, layout, flatbuffer.bias_tensor(graph, operator), layers)
        _, _, operators = found.setdefault((id(weights), id(layer)), (layer, layout, []))
        operators.append(operator)
        owners.setdefault(id(weights), layer)
    for (weights, _), (layer, _, operators) in found.items():
        if owners[weights] is not layer:
            flatbuffer.give_own_weights(graph, operators)
    return list(found.values())


def _bias_codes(layer, bias, scale):
    """Codes of a bias at a scale of shape [1] or [channels], which fit into 32 bits."""
    codes = np.round(bias / scale.astype(np.float64))
    if np.max(np.abs(codes)) > MAX_BIAS_CODE:
        channel = int(np.argmax(np.abs(codes)))
        raise ValueError(
            f"layer {layer.name!r}: the bias {bias[channel]:g} of channel {channel} overflows int32 at scale "
            f"{np.broadcast_to(scale, codes.shape)[channel]:g}; use a larger weight scale"
        )
    return codes


def _check_supported(model, weight_bits):
    """Refuses layers whose weights would not be on the grid asked for."""
    for layer in graph.find_layers(model):
        is_transposed = isinstance(layer, keras.layers.Conv2DTranspose)  # left as the converter has it: 8 bits
        if isinstance(layer, keras.layers.SeparableConv2D) or (is_transposed and weight_bits < 8):
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be written on a grid of "
                f"{weight_bits} bits; Conv2D, DepthwiseConv2D and Dense can"
            )


def _check_given(kernels, layers):
    by_name = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    for name, quantized in kernels.items():
        if name not in by_name:
            raise ValueError(f"kernels names {name!r}, which is no layer of the model; known: {', '.join(by_name)}")
        if len(by_name[name]) > 1:
            raise ValueError(
                f"kernels names {name!r}, but {len(by_name[name])} layers of the nested models are called so; give "
                "them different names"
            )
        shape = kernel_of(by_name[name][0]).shape
        if quantized.codes.shape != shape:
            raise ValueError(f"layer {name!r}: the codes have shape {quantized.codes.shape}, its kernel {shape}")


def _layer_of(flat, weights, layout, bias_tensor, layers):
    """The layer whose kernel a weight tensor holds, found by value: names do not survive every conversion.

    Where several layers have that kernel, the one whose bias is nearest.
    """
    codes = flatbuffer.weight_codes(flat, weights, layout).astype(np.float32)
    scale = weights.quantization.scale
    found = []
    for layer in layers:
        kernel = kernel_of(layer)
        if kernel.shape == codes.shape and np.all(np.abs(kernel - codes * scale) <= 0.51 * scale):
            found.append(layer)
    if not found:
        raise ValueError(
            f"the file's weights {weights.name.decode()!r} {list(weights.shape)} are those of no layer of the model; "
            "was it changed after the conversion?"
        )
    # The converter leaves out biases of zero.
    bias = 0.0 if bias_tensor is None else flatbuffer.bias_codes(flat, bias_tensor) * bias_tensor.quantization.scale
    return min(found, key=lambda layer: np.max(np.abs(bias_of(layer) - bias)))
