"""Running TensorFlow's converter to TFLite on functional Keras models."""

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import converter_errors, graph, native_output

# Too small to change a code, but not zero, so that TensorFlow keeps it.
_NEXT_TO_NOTHING = 1e-30
_INT16 = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8


def make_converter(
    model: keras.Model,
    input_shapes: Sequence[Sequence[int]],
    run_model: Callable[[keras.Model, Sequence[Any]], Any] | None = None,
) -> tf.lite.TFLiteConverter:
    """Makes a converter for a model with batch 1, for runtimes without dynamic shapes.

    Args:
      model: Functional model.
      input_shapes: Shape of one sample of each input, without the batch dimension, in the order of `model.inputs`.
      run_model: Function (model, tensors in the order of `model.inputs`) -> outputs in the model's own structure, which
        is what the converter sees; by default the model's own call.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import converter
      >>> model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Conv2D(4, 3)])
      >>> converter.run(converter.make_converter(model, [[8, 8, 3]]))[4:8]
      b'TFL3'
    """
    specs = [
        tf.TensorSpec((1, *shape), tensor.dtype, name=name)
        for tensor, name, shape in zip(model.inputs, name_inputs(model), input_shapes, strict=True)
    ]

    def call(*inputs):
        outputs = run_model(model, inputs) if run_model else model(graph.pack_inputs(model, inputs), training=False)
        return outputs if tf.is_tensor(outputs) else _name_outputs(outputs)

    with _biases_of_transposed_convolutions(model):
        function = tf.function(call).get_concrete_function(*specs)
    # The variables that the function reads. Given the Keras model instead, TensorFlow would trace and save every layer.
    holder = tf.Module()
    holder.weights = model.weights
    return tf.lite.TFLiteConverter.from_concrete_functions([function], holder)


@contextlib.contextmanager
def _biases_of_transposed_convolutions(model):
    """Lets transposed convolutions without a bias, or with one of zeros, add a bias that is next to nothing.

    TensorFlow fuses no ReLU with a transposed convolution without bias, and computes both in float.
    """
    activations = {
        layer: layer.activation
        for layer in graph.find_layers(model, keras.layers.Conv2DTranspose)
        if not (layer.use_bias and np.any(layer.bias))
    }

    def add_bias(activation, channels):
        return lambda outputs: activation(tf.nn.bias_add(outputs, tf.fill([channels], _NEXT_TO_NOTHING)))

    try:
        for layer, activation in activations.items():
            if layer.data_format == "channels_last":
                layer.activation = add_bias(activation, layer.filters)
        yield
    finally:
        for layer, activation in activations.items():
            layer.activation = activation


def name_inputs(model: keras.Model) -> list[str]:
    """Names of a model's inputs in files, in the order of `model.inputs`: with letters, digits and underscores only.

    Args:
      model: Functional model.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import converter
      >>> inputs = [keras.Input([3], name="side"), keras.Input([3], name="main/features")]
      >>> converter.name_inputs(keras.Model(inputs, inputs[0] + inputs[1]))
      ['side', 'main_features']
    """
    if len(model.inputs) == 1:
        return ["image"]  # in every file, whatever the model calls it
    names: list[str] = []
    for name in graph.input_names(model):
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        while name in names:
            name += "_"
        names.append(name)
    return names


def _name_outputs(outputs):
    """{name: tensor} of a structure of outputs, without the structure, which a file's signature cannot have."""
    tensors = {}

    def walk(part, path):
        if isinstance(part, dict):
            for key, value in part.items():
                walk(value, [*path, str(key)])
        elif isinstance(part, (list, tuple)):
            for index, value in enumerate(part):
                walk(value, [*path, str(index)] if path else [f"output_{index}"])
        else:
            name = "_".join(path)
            while name in tensors:
                name += "_"
            tensors[name] = part

    walk(outputs, [])
    return tensors


def make_integer_converter(
    model: keras.Model,
    input_shapes: Sequence[Sequence[int]],
    activation_bits: int,
    inference_type: tf.DType,
    run_model: Callable[[keras.Model, Sequence[Any]], Any],
) -> tf.lite.TFLiteConverter:
    """Makes a converter that writes an integer file of a model with quantizers.

    Args:
      model: Functional model with an `ActivationQuantizer` wherever the file rounds activations.
      input_shapes: Shape of one sample of each input, without the batch dimension.
      activation_bits: Bits of activations, 8 or 16.
      inference_type: Type of the file's inputs and outputs.
      run_model: See `make_converter`; `tf_repvgg.quantization.shared_grids.run_on_shared_grids`.
    """
    result = make_converter(model, input_shapes, run_model)
    result.optimizations = [tf.lite.Optimize.DEFAULT]
    if activation_bits == 16:
        result.target_spec.supported_ops = [_INT16]
    result.inference_input_type = result.inference_output_type = inference_type
    return result


def make_calibrating_converter(
    model: keras.Model, samples: Sequence[Sequence[np.ndarray]], inference_type: tf.DType
) -> tf.lite.TFLiteConverter:
    """Makes a converter that writes an integer file of a float model with ranges that TensorFlow itself measures.

    Args:
      model: Functional model.
      samples: Calibration samples, each an array [1, ...] for each input.
      inference_type: Type of the file's inputs and outputs.
    """
    result = make_converter(model, [array.shape[1:] for array in samples[0]])
    result.optimizations = [tf.lite.Optimize.DEFAULT]
    result.representative_dataset = lambda: (list(sample) for sample in samples)
    result.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    result.inference_input_type = result.inference_output_type = inference_type
    return result


def run(converter: tf.lite.TFLiteConverter) -> bytes:
    """Runs a converter without the output of its native code, and returns the file.

    Raises:
      ValueError: If the converter fails. The message names the operation that it cannot write.
    """
    with warnings.catch_warnings(), native_output.hide():
        warnings.simplefilter("ignore")
        try:
            return converter.convert()
        except Exception as error:  # of any kind, with pages of the converter's own representation of the model
            failure = error
    raise ValueError(converter_errors.explain_conversion(failure, 16 if _writes_16_bits(converter) else 8))


def _writes_16_bits(converter):
    return _INT16 in converter.target_spec.supported_ops


def find_float_tensors(file: bytes) -> list[str]:
    """Names of the tensors, other than inputs and outputs, that a file computes in float.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import converter
      >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2), keras.layers.Softmax(name="softmax")])
      >>> len(converter.find_float_tensors(converter.run(converter.make_converter(model, [[3]])))) > 0
      True
    """
    from ai_edge_litert.interpreter import Interpreter

    with native_output.hide():
        interpreter = Interpreter(model_content=file)
    ends = {details["index"] for details in (*interpreter.get_input_details(), *interpreter.get_output_details())}
    return [
        details["name"]
        for details in interpreter.get_tensor_details()
        if details["dtype"] == np.float32 and details["index"] not in ends
    ]


def find_load_error(file: bytes) -> str | None:
    """Why LiteRT's own kernels cannot load a file, on one line that names the operation; None if they load it.

    A bias of 32 bits beside int16 activations, which the converter gives some layers, is no error here, nor is the
    scale that it gives int16 sigmoids and tanhs: both are mended when weights are written.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import converter
      >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
      >>> converter.find_load_error(converter.run(converter.make_converter(model, [[3]]))) is None
      True
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with native_output.hide():
        interpreter = Interpreter(
            model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        )
        try:
            converter_errors.allocate_tensors(interpreter)
        except ValueError as error:
            is_mended = any(text in str(error) for text in ("bias->type", "output->params.scale == 1. / 32768"))
            return None if is_mended else str(error)
    return None
