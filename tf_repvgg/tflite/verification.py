"""Running a file beside the quantized model that it was made from: every quantizer must see the same values."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import converter, graph
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import AUGMENTATIONS, RANGE_PRESERVING
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, QuantizedLayer, apply_kernel
from tf_repvgg.tflite import flatbuffer, interpreter
from tf_repvgg.tflite.weights import layer_names

# Steps of its own grid by which a tensor of the file may differ. LiteRT's kernels round twice where the model rounds
# once; tables of int16 functions are interpolated.
_LARGEST_DISTANCE = {8: 2.5, 16: 128.0}
_RELATIVE_SCALE_ERROR = 1e-5
# Layers whose outputs have the grid of their inputs, and which the file rounds all the same.
_AVERAGING = (keras.layers.AveragePooling2D, keras.layers.Resizing, keras.layers.UpSampling2D)
# Share of an output's standard deviation by which a whole file may differ from its float model. Files of 8 bits differ
# by a few percent; a constant that is lost, or a function that has no good integer kernel, by far more.
_LARGEST_OUTPUT_DISTANCE = 0.5


class WrongFileError(ValueError):
    """A file computes something else than the model that it was made from.

    Example:
      >>> from tf_repvgg import tflite
      >>> try:
      ...     raise tflite.WrongFileError("the file departs from the model at layer 'conv': ...")
      ... except ValueError as error:
      ...     print(error)
      the file departs from the model at layer 'conv': ...
    """


def make_samples(model: keras.Model, input_shapes: Sequence[Sequence[int]]) -> list[list[np.ndarray]]:
    """Makes inputs on which every part of a model computes something: fine noise, and coarse patches of its range.

    Args:
      model: Quantized model.
      input_shapes: Shape of one sample of each input, without the batch dimension.

    Returns:
      Samples, each a list of arrays [1, ...], one for each input; zeros where an input is not quantized.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> quantized = ptq.quantize(model, calibration=np.ones([1, 8, 8, 3]))
      >>> [[values.shape for values in sample] for sample in tflite.make_samples(quantized, [(8, 8, 3)])]
      [[(1, 8, 8, 3)], [(1, 8, 8, 3)]]
    """
    generator = np.random.default_rng(0)
    ranges = [_find_input_range(model, tensor) for tensor in model.inputs]

    def draw(shape, dtype, value_range, patch):
        if value_range is None:
            return np.zeros([1, *shape], dtype)
        sizes = [-(-size // patch) for size in shape[:-1]] + list(shape[-1:])
        values = generator.uniform(value_range[0], value_range[1], sizes)
        for axis in range(len(shape) - 1):
            values = np.repeat(values, patch, axis)
        return values[tuple(map(slice, shape))][np.newaxis].astype(dtype)

    dtypes = [tensor.dtype.as_numpy_dtype for tensor in model.inputs]
    return [
        [draw(*arguments, patch) for arguments in zip(input_shapes, dtypes, ranges, strict=True)] for patch in (1, 4)
    ]


def verify(
    file: bytes, model: keras.Model, samples: Sequence[Sequence[np.ndarray]], given: Collection[str] = ()
) -> None:
    """Checks that a file computes what its quantized model computes.

    The model runs on each sample, layer by layer. At every quantizer, the nearest tensor of the file that has the
    quantizer's grid takes the place of the model's own values, so that differences do not add up.

    Args:
      file: Integer file of batch 1, as `with_weights` writes it.
      model: Quantized model that the file was made from.
      samples: Inputs, as `make_samples` makes them.
      given: Names of layers that got other codes than their own. The model runs with the file's kernels for them, and
        for layers with float kernels.

    Raises:
      WrongFileError: If LiteRT cannot load the file; or if a tensor differs by more than a few steps of its grid. The
        message names the first layer that departs.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> quantized = ptq.quantize(model, calibration=np.ones([1, 8, 8, 3]))
      >>> file = tflite.convert(quantized)
      >>> quantized.get_layer("conv").bias.assign_add([9.0] * 4)  # doctest: +ELLIPSIS
      <tf.Variable ...>
      >>> try:
      ...     tflite.verify(file, quantized, tflite.make_samples(quantized, [(8, 8, 3)]))
      ... except tflite.WrongFileError as error:
      ...     print(str(error).partition(":")[0])
      the file departs from the model at layer 'conv'
    """
    loaded = _LoadedFile(file, converter.name_inputs(model))
    kernels = _read_kernels(file, model, given)
    for sample in samples:
        _Comparison(loaded.run(sample), kernels).run(model, sample)


def verify_outputs(file: bytes, model: keras.Model, samples: Sequence[Sequence[np.ndarray]]) -> None:
    """Checks that a file's outputs are near those of a float model.

    Args:
      file: Integer file of batch 1 that TensorFlow's converter has made.
      model: Float model that the file was made from.
      samples: Calibration samples, each an array [1, ...] for each input.

    Raises:
      WrongFileError: If LiteRT cannot load the file, or an output differs by half of its standard deviation.
    """
    batch = [np.concatenate(arrays) for arrays in zip(*samples, strict=True)]
    outputs = model.predict_on_batch(graph.pack_inputs(model, batch))
    images = batch[0] if len(batch) == 1 else dict(zip(converter.name_inputs(model), batch, strict=True))
    predicted = interpreter.predict(file, images, default_delegate=False)
    # Both are in the order of names.
    values = [predicted[name] for name in sorted(predicted)] if isinstance(predicted, dict) else [predicted]
    for expected, actual in zip(tf.nest.flatten(outputs), values, strict=True):
        distance = float(np.sqrt(np.mean(np.square(actual - expected)))) / (float(np.std(expected)) or 1.0)
        if distance > _LARGEST_OUTPUT_DISTANCE:
            raise WrongFileError(
                f"the file departs from the model: an output differs by {100 * distance:.0f} % of its standard "
                "deviation; TensorFlow's integer kernels do not compute one of the operations well enough"
            )


def _find_input_range(model, tensor):
    """(minimum, maximum) of the quantizer that an input goes into; None if there is none."""
    key = str(id(tensor))
    for node in graph.nodes(model):
        if isinstance(node.layer, ActivationQuantizer) and key in node.flat_input_ids:
            minimum, maximum = node.layer.bounds()
            return float(minimum), float(maximum)
    return None


def _read_kernels(file, model, given):
    """{id of a layer: its kernel as the file has it} of the layers that do not hold the codes of the file."""
    flat = flatbuffer.unpack(file)
    by_name = {}
    for subgraph in flat.subgraphs:
        for operator in subgraph.operators:
            if (layout := flatbuffer.weights_layout(flat, operator)) is not None:
                tensor = flatbuffer.weights_tensor(subgraph, operator)
                scale = np.asarray(tensor.quantization.scale, np.float32)
                by_name[flatbuffer.weights_layer_name(tensor)] = flatbuffer.weight_codes(flat, tensor, layout) * scale
    names = layer_names(model)
    layers = graph.find_layers(model, WEIGHTED_LAYERS)
    return {
        id(layer): by_name[names[id(layer)]]
        for layer in layers
        if names[id(layer)] in by_name and not (isinstance(layer, QuantizedLayer) and names[id(layer)] not in given)
    }


class _Tensor(NamedTuple):
    """A quantized tensor of the file, with its values on one sample."""

    name: str
    scale: float
    values: np.ndarray


class _State(NamedTuple):
    """What is known of a tensor of the model.

    Attributes:
      scale: Step of the tensor's grid; zero if it is on none.
      bits: Bits of the grid.
      suspicion: Message that says where the file may depart from the model before this tensor; or empty.
      tensor: The tensor itself, which must live as long as its id counts.
    """

    scale: float = 0.0
    bits: int = 8
    suspicion: str = ""
    tensor: Any = None


class _LoadedFile:
    """A file in LiteRT, on kernels that keep all tensors."""

    def __init__(self, file, input_names):
        try:
            self._interpreter = interpreter.load_interpreter(
                file, 1, default_delegate=False, experimental_preserve_all_tensors=True
            )
        except (RuntimeError, ValueError) as error:
            raise WrongFileError(f"LiteRT does not load the file: {' '.join(str(error).split())}") from None
        self._inputs = self._interpreter.get_input_details()
        if len(self._inputs) > 1:  # in the converter's order; only the signature has their names
            by_name = self._interpreter.get_signature_runner().get_input_details()
            self._inputs = [by_name[name] for name in input_names]

    def run(self, sample) -> list[_Tensor]:
        for details, values in zip(self._inputs, sample, strict=True):
            self._interpreter.set_tensor(details["index"], interpreter.quantize_input(values, details))
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            message = " ".join(str(error).split())
            advice = "a divisor rounds to zero on its grid" if "div.cc" in message else "an operation fails"
            raise WrongFileError(f"the file does not run on calibration images, {advice}: {message}") from None
        tensors = []
        for details in self._interpreter.get_tensor_details():
            scale, _ = details["quantization"]
            if not scale:
                continue
            try:
                values = self._interpreter.get_tensor(details["index"])
            except ValueError:  # a tensor that kernels use for themselves
                continue
            tensors.append(_Tensor(details["name"], scale, interpreter.dequantize_output(values, details)))
        return tensors


class _Comparison:
    """A run of the model on one sample, with the file's values wherever the model quantizes."""

    def __init__(self, tensors: Sequence[_Tensor], kernels: dict[int, np.ndarray]) -> None:
        self._tensors, self._kernels = tensors, kernels
        self._states: dict[int, _State] = {}

    def run(self, model, sample):
        for output in tf.nest.flatten(graph.replay(model, [tf.constant(values) for values in sample], self._replace)):
            state = self._states.get(id(output))
            if state is not None and state.suspicion:
                raise WrongFileError(state.suspicion)

    def _replace(self, layer) -> Callable:
        run = self._with_kernel_of_file(layer) if id(layer) in self._kernels else layer
        if isinstance(layer, AUGMENTATIONS):  # called by themselves, these layers take it for training
            run = tf.identity

        def call(*arguments, **keywords):
            outputs = run(*arguments, **keywords)
            inputs = [self._states[id(value)] for value in tf.nest.flatten((arguments, keywords)) if self._knows(value)]
            suspicion = next((state.suspicion for state in inputs if state.suspicion), "")
            if isinstance(layer, ActivationQuantizer):
                return self._compare(outputs, layer.scale(), layer.bits, layer.name, suspicion)
            if not isinstance(layer, RANGE_PRESERVING) or not inputs:
                return tf.nest.map_structure(
                    lambda output: self._remember(output, _State(suspicion=suspicion)), outputs
                )
            state = inputs[0]
            if isinstance(layer, _AVERAGING) and state.scale:
                return self._compare(outputs, state.scale, state.bits, layer.name, suspicion)
            return self._remember(outputs, state)

        return call

    def _with_kernel_of_file(self, layer):
        def call(inputs, **_):
            outputs = apply_kernel(layer, inputs, self._kernels[id(layer)])
            return layer.activation(outputs + layer.bias if layer.use_bias else outputs)

        return call

    def _knows(self, value):
        return id(value) in self._states

    def _remember(self, tensor, state):
        self._states[id(tensor)] = state._replace(tensor=tensor)
        return tensor

    def _compare(self, values, scale, bits, name, suspicion):
        """The tensor of the file that stands for values of the model, or the values themselves if none is near.

        A quantizer before an operation that the converter fuses has no tensor of its own. So a quantizer without a near
        tensor is only suspicious; if the next one has none either, or none follows, the file is wrong.
        """
        nearest = self._find_nearest(values, scale)
        distance = np.inf
        if nearest is not None:
            distance = float(np.max(np.abs(nearest.values.reshape(values.shape) - values), initial=0)) / scale
        if distance <= _LARGEST_DISTANCE[bits]:
            values = tf.constant(nearest.values.reshape(values.shape), values.dtype)
            return self._remember(values, _State(scale, bits))
        if suspicion:
            raise WrongFileError(suspicion)
        difference = (
            "the file has no tensor on the grid of the model"
            if nearest is None
            else f"its tensor {nearest.name!r} differs by {distance:.0f} steps of the grid, and "
            f"{_LARGEST_DISTANCE[bits]:g} are what rounding explains"
        )
        suspicion = (
            f"the file departs from the model at layer {name.removesuffix('_quantizer')!r}: {difference}; write this "
            "operation in another way, or report the model to us"
        )
        return self._remember(values, _State(scale, bits, suspicion))

    def _find_nearest(self, values, scale):
        size, values = int(tf.size(values)), values.numpy().ravel()
        candidates = [
            tensor
            for tensor in self._tensors
            if tensor.values.size == size and abs(tensor.scale / scale - 1) < _RELATIVE_SCALE_ERROR
        ]
        return min(
            candidates,
            key=lambda tensor: float(np.max(np.abs(tensor.values.ravel() - values), initial=0)),
            default=None,
        )
