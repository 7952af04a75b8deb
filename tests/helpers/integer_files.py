"""Reading integer files with the interpreter alone, and simulating them in real numbers."""

import numpy as np
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from helpers.networks import small_repvgg
from tf_repvgg import tflite
from tf_repvgg.tflite import flatbuffer

_INTEGER_LIMITS = {schema.TensorType.INT8: np.iinfo(np.int8), schema.TensorType.UINT8: np.iinfo(np.uint8)}
_OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


def make_repvgg_with_biases(padding="same"):
    """As `small_repvgg`, with biases in the last layer too."""
    model = small_repvgg(padding)
    model.get_layer("logits").bias.assign(np.linspace(-1, 1, 5))
    return model


def plain_model(*layers, size=(6, 6, 4), name=None):
    return keras.Sequential([keras.Input(size), *layers], name=name)


def plain_layers(model):
    """The Conv2D and Dense layers of a model."""
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]


def read_tensors(file):
    """The interpreter of a file, and {tensor index: details} of what it has read."""
    interpreter = Interpreter(model_content=file)
    interpreter.allocate_tensors()
    return interpreter, {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}


def read_biases(file):
    """[(codes, scales, input scale)] for all operators with biases, in execution order."""
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    biases = []
    for operator in graph.operators:
        if flatbuffer.weights_layout(flat, operator) is not None:
            if len(operator.inputs) < 3 or operator.inputs[2] < 0:
                continue  # the converter leaves out biases of zero
            tensor = graph.tensors[operator.inputs[2]]
            assert tensor.type == schema.TensorType.INT32
            input_scale = graph.tensors[operator.inputs[0]].quantization.scale[0]
            biases.append((flatbuffer.constant(flat, tensor, np.int32), tensor.quantization.scale, input_scale))
    return biases


def simulate(file, image):
    """Computes a file in real numbers, rounded to the grid of each activation, from its scales and zero points.

    Every operator is computed in double precision from dequantized codes, and its output put on the grid that the file
    states for that tensor, so a wrong scale, zero point, bias or weight anywhere shows at the end.
    """
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    values = {graph.inputs[0]: _round_to_grid(graph.tensors[graph.inputs[0]], image[np.newaxis].astype(np.float64))}
    for operator in graph.operators:
        output = _compute(flat, graph, operator, values)
        if getattr(operator.builtinOptions, "fusedActivationFunction", 0) == schema.ActivationFunctionType.RELU:
            output = np.maximum(output, 0)
        values[operator.outputs[0]] = _round_to_grid(graph.tensors[operator.outputs[0]], output)
    return values[graph.outputs[0]][0]


def _round_to_grid(tensor, values):
    if tensor.type not in _INTEGER_LIMITS:
        return values
    scale, zero_point = float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
    limits = _INTEGER_LIMITS[tensor.type]
    codes = np.clip(np.round(values / scale) + zero_point, limits.min, limits.max)
    return (codes - zero_point) * scale


def _dequantize_constant(flat, graph, index, dtype):
    if index < 0:
        return 0.0  # the file leaves out the bias
    tensor = graph.tensors[index]
    codes = flatbuffer.constant(flat, tensor, dtype).astype(np.float64)
    shape = np.ones(codes.ndim, int)
    shape[tensor.quantization.quantizedDimension] = -1
    return codes * np.asarray(tensor.quantization.scale).reshape(shape)


def _compute(flat, graph, operator, values):
    name = _OPERATOR_NAMES[flatbuffer.operator_code(flat, operator)]
    x, options = values[operator.inputs[0]], operator.builtinOptions
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
        kernel = _dequantize_constant(flat, graph, operator.inputs[1], np.int8)
        bias = _dequantize_constant(flat, graph, operator.inputs[2], np.int32)
        padding = "SAME" if getattr(options, "padding", None) == schema.Padding.SAME else "VALID"
    if name == "CONV_2D":
        strides, dilation = [options.strideH, options.strideW], options.dilationHFactor
        return tf.nn.conv2d(x, np.moveaxis(kernel, 0, -1), strides, padding, dilations=dilation).numpy() + bias
    if name == "DEPTHWISE_CONV_2D":
        kernel = kernel.reshape(*kernel.shape[1:3], x.shape[-1], -1)
        return tf.nn.depthwise_conv2d(x, kernel, [1, options.strideH, options.strideW, 1], padding).numpy() + bias
    if name == "FULLY_CONNECTED":
        return x @ kernel.T + bias
    if name == "MEAN":
        return x.mean(axis=(1, 2), keepdims=bool(options.keepDims))
    if name == "LOGISTIC":
        return 1 / (1 + np.exp(-x))
    if name == "MUL":
        return x * values[operator.inputs[1]]
    if name == "PAD":
        return np.pad(x, flatbuffer.constant(flat, graph.tensors[operator.inputs[1]], np.int32))
    assert name in ("QUANTIZE", "DEQUANTIZE")
    return x


def output_step(file):
    """Scale of the last int8 tensor: one step of the logits."""
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    index = graph.outputs[0]
    if graph.tensors[index].type == schema.TensorType.FLOAT32:
        index = graph.operators[-1].inputs[0]
    return float(graph.tensors[index].quantization.scale[0])


def assert_computes_what_it_says(file, images):
    computed = tflite.predict(file, images)
    expected = np.stack([simulate(file, image) for image in images])
    assert computed.shape == expected.shape
    assert np.max(np.abs(computed - expected)) <= 2.01 * output_step(file)
    assert np.ptp(computed) > 20 * output_step(file)  # the comparison means something
