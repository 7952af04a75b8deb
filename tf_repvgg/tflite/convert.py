"""From a fused Keras model to a fully integer TFLite file whose weights are exactly the codes asked for."""

import json
import warnings
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import native_output
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.uniform import QuantizedKernel, quantize_min_max
from tf_repvgg.tflite import flatbuffer

INFERENCE_TYPES = {"int8": tf.int8, "uint8": tf.uint8, "float32": tf.float32}
METADATA_NAME = "TF_REPVGG_INPUT"
# Half of what 32 bits hold: the accumulator starts at the bias and needs room for the products.
_MAX_BIAS_CODE = 2**30


def convert(
    model: keras.Model,
    calibration,
    per_channel: bool = True,
    inference_type: str = "int8",
    weight_bits: int = 8,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping | None = None,
) -> bytes:
    """Writes a fused model as a fully integer file: int8 activations and weights, int32 biases, batch 1.

    Activation ranges are the smallest and largest values seen on the calibration images. Weights are those of
    `with_weights`.

    Args:
      model: deploy-form model with one input (see `tf_repvgg.fusion.fuse`).
      calibration: iterable of normalised float images [height, width, channels], without a batch dimension.
      per_channel: one weight scale per output channel, or one per tensor.
      inference_type: type of input and output: "int8", "uint8" or "float32".
      weight_bits: 2 to 8: of the uniform weight grid, stored in int8.
      kernels: codes and scales by layer name, for layers that are already quantized.
      metadata: JSON-serializable facts to store in the file under the name TF_REPVGG_INPUT, such as the
        preprocessing that the model expects and the names of its classes.

    Returns:
      The bytes of the file.

    Raises:
      ValueError: for a model that is not fused, an unknown inference type, bits out of range, or calibration images
        that are none, of another shape, or not finite.
    """
    if inference_type not in INFERENCE_TYPES:
        raise ValueError(f"inference_type is {inference_type!r}; known: {', '.join(INFERENCE_TYPES)}")
    for layer in model._flatten_layers():
        if isinstance(layer, ReparameterizedBlock):
            raise ValueError(f"block {layer.name!r} is still in training form; call tf_repvgg.fusion.fuse(model) first")
    file = _calibrated(model, _checked(calibration, model.input_shape), inference_type)
    return with_weights(file, model, weight_bits, per_channel, kernels, metadata)


def _checked(calibration, input_shape):
    """Calibration images as a list of batches of one."""
    shape = tuple(input_shape[1:])
    images = []
    for index, image in enumerate(calibration):
        image = np.asarray(image, np.float32)
        if len(image.shape) != 3 or any(size not in (None, its) for size, its in zip(shape, image.shape, strict=True)):
            raise ValueError(f"calibration image {index} has shape {image.shape}; the model's input is {shape}")
        if not np.all(np.isfinite(image)):
            raise ValueError(f"calibration image {index} holds infinities or NaN")
        images.append(image[np.newaxis])
    if not images:
        raise ValueError("there are no calibration images; activation ranges need at least one")
    return images


def _calibrated(model, images, inference_type):
    """TensorFlow's own integer conversion: right in everything but the weights' grid."""
    # A fixed batch of 1: what runtimes without dynamic shapes need.
    function = tf.function(lambda image: model(image, training=False)).get_concrete_function(
        tf.TensorSpec(images[0].shape, tf.float32, name="image")
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = INFERENCE_TYPES[inference_type]
    with warnings.catch_warnings(), native_output.hidden():
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

    Layers named in `kernels` get exactly those codes and scales; all others are rounded by `quantize_min_max`.
    Biases are int32 with scale (input scale * weight scale). Arguments as for `convert`.

    Raises:
      ValueError: if an operator of the file has no counterpart in the model, a layer's weights cannot be put on the
        grid, `kernels` names no layer of the model or has another shape, or given codes leave no room for a bias.
    """
    flat = flatbuffer.unpack(file)
    kernels = dict(kernels or {})
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]
    _check_supported(model, weight_bits)
    _check_given(kernels, layers)
    for graph in flat.subgraphs:
        for operator in graph.operators:
            if (position := flatbuffer.WEIGHTS_INPUT.get(flatbuffer.operator_code(flat, operator))) is None:
                continue
            weights = graph.tensors[operator.inputs[position]]
            bias_tensor = flatbuffer.bias_tensor(graph, operator)
            layer = _layer_of(flat, weights, bias_tensor, layers)
            input_scale = graph.tensors[operator.inputs[0]].quantization.scale[0]
            bias = _bias_of(layer)
            if layer.name in kernels:
                quantized = kernels[layer.name]
            else:
                # Below this scale the bias would overflow its 32 bits; a hair above, as float32 rounds the product.
                floor = 1.001 * np.abs(bias) / (input_scale * _MAX_BIAS_CODE)
                quantized = quantize_min_max(layer.kernel.numpy(), weight_bits, per_channel, min_scale=floor)
            flatbuffer.set_constant(flat, weights, np.moveaxis(quantized.codes, -1, 0), quantized.scale)
            weights.quantization.quantizedDimension = 0
            bias_scale = input_scale * quantized.scale
            codes = np.round(bias / bias_scale.astype(np.float64))
            if np.max(np.abs(codes)) > _MAX_BIAS_CODE:
                channel = int(np.argmax(np.abs(codes)))
                raise ValueError(
                    f"layer {layer.name!r}: the bias {bias[channel]:g} of channel {channel} overflows int32 at scale "
                    f"{np.broadcast_to(bias_scale, codes.shape)[channel]:g}; use a larger weight scale"
                )
            if bias_tensor is not None:
                flatbuffer.set_constant(flat, bias_tensor, codes.astype(np.int32), bias_scale)
    if metadata is not None:
        flatbuffer.set_metadata(flat, METADATA_NAME, json.dumps(metadata).encode())
    flatbuffer.drop_unused_buffers(flat)
    return flatbuffer.pack(flat)


def _check_supported(model, weight_bits):
    """Refuses layers whose weights would not be on the grid asked for."""
    for layer in model._flatten_layers():
        is_transposed = isinstance(layer, keras.layers.Conv2DTranspose)  # left as the converter has it: 8 bits
        if isinstance(layer, keras.layers.DepthwiseConv2D) or (is_transposed and weight_bits < 8):
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be written on a grid of "
                f"{weight_bits} bits; Conv2D and Dense can"
            )


def _check_given(kernels, layers):
    shapes = {layer.name: tuple(layer.kernel.shape) for layer in layers}
    for name, quantized in kernels.items():
        if name not in shapes:
            raise ValueError(f"kernels names {name!r}, which is no layer of the model; known: {', '.join(shapes)}")
        if quantized.codes.shape != shapes[name]:
            raise ValueError(f"layer {name!r}: the codes have shape {quantized.codes.shape}, its kernel {shapes[name]}")


def _bias_of(layer):
    return layer.bias.numpy() if layer.use_bias else np.zeros(layer.kernel.shape[-1], np.float32)


def _layer_of(flat, weights, bias_tensor, layers):
    """The layer whose kernel a weight tensor holds, found by value: names do not survive every conversion.

    Where several layers have that kernel, the one whose bias is nearest.
    """
    codes = flatbuffer.constant(flat, weights, np.int8).astype(np.float32)
    scale = np.asarray(weights.quantization.scale).reshape(-1, *[1] * (codes.ndim - 1))
    found = []
    for layer in layers:
        kernel = np.moveaxis(layer.kernel.numpy(), -1, 0)
        if kernel.shape == codes.shape and np.all(np.abs(kernel - codes * scale) <= 0.51 * scale):
            found.append(layer)
    if not found:
        raise ValueError(
            f"the file's weights {weights.name.decode()!r} {list(weights.shape)} are those of no layer of the model; "
            "was it changed after the conversion?"
        )
    # The converter leaves out biases of zero.
    bias = (
        0.0
        if bias_tensor is None
        else flatbuffer.constant(flat, bias_tensor, np.int32) * bias_tensor.quantization.scale
    )
    return min(found, key=lambda layer: np.max(np.abs(_bias_of(layer) - bias)))
