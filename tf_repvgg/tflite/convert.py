"""Writing integer files: TensorFlow's converter on a quantized model, then the exact codes, then a check."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import converter, graph
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.checks import check_fused
from tf_repvgg.quantization.exportability import check_not_recurrent
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.samples import read_samples, stack_samples
from tf_repvgg.quantization.shared_grids import run_on_shared_grids
from tf_repvgg.quantization.uniform import QuantizedKernel
from tf_repvgg.tflite.verification import make_samples, verify, verify_outputs
from tf_repvgg.tflite.weights import with_weights

INFERENCE_TYPES = {"int8": tf.int8, "uint8": tf.uint8, "int16": tf.int16, "float32": tf.float32}
_INFERENCE_TYPES_OF_BITS = {8: ("int8", "uint8", "float32"), 16: ("int16", "float32")}


def convert(
    model: keras.Model,
    calibration: Any = None,
    per_channel: bool = True,
    inference_type: str | None = None,
    weight_bits: int = 8,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> bytes:
    """Writes a fused model as a fully integer file: int8 activations and weights, integer biases, batch 1.

    A quantized model, one that holds `ActivationQuantizer`s, needs no calibration: the file has its calibration ranges,
    and int16 activations if they have 16 bits. For any other model the ranges are the smallest and the largest
    values on the calibration images (see `tf_repvgg.quantization.ptq.calibrate`). Weights are written by
    `with_weights`. Every file is run beside the quantized model before it is returned (see `verify`).

    Args:
      model: Deploy-form model (see `tf_repvgg.fusion.fuse`).
      calibration: Calibration images, as for `ptq.calibrate`; None for a quantized model.
      per_channel: Whether each output channel has a weight scale of its own; otherwise each tensor has one.
      inference_type: Type of input and output: "int8", "uint8" or "float32", or for int16 activations "int16" or
        "float32"; by default the type of the activations.
      weight_bits: Bits of the uniform weight grid, from 2 to 8; stored in int8.
      kernels: {layer name: codes and scales} of layers that are quantized already; see `with_weights`.
      metadata: JSON-serializable content to store in the file under the name TF_REPVGG_INPUT, such as the
        preprocessing that the model expects and the names of its classes.
      image_size: Height and width for a quantized model that leaves them free; for a float model, those of the images.

    Returns:
      The file.

    Raises:
      ValueError: If the model is not fused or has an operation without an integer form, the inference type or the bits
        are unknown, or calibration images are missing, of another shape, not finite, or given for a quantized model;
        or if an activation of a quantized model has no range, or the model's size is free.
      WrongFileError: If the file computes something else than the quantized model. The message names the layer.

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
    calibrated = calibrate(model, calibration, inference_type, image_size)
    return calibrated.with_weights(weight_bits, per_channel, kernels, metadata)


@dataclasses.dataclass(frozen=True)
class CalibratedFile:
    """An integer file with the ranges of activations; `with_weights` makes the final files from it.

    Attributes:
      content: The file, with weights as TensorFlow's converter rounds them.
      model: Model whose weights the final files get.
      input_shapes: Shape of one sample of each input, without the batch dimension.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> calibrated = tflite.calibrate(model, np.ones([1, 8, 8, 3]))
      >>> files = [calibrated.with_weights(weight_bits=bits) for bits in (8, 4)]
      >>> [int(abs(tflite.weight_codes(file)[0].codes).max()) for file in files]
      [127, 7]
    """

    content: bytes
    model: keras.Model
    input_shapes: Sequence[Sequence[int]]

    def with_weights(
        self,
        weight_bits: int = 8,
        per_channel: bool = True,
        kernels: Mapping[str, QuantizedKernel] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Writes a file with weights of some width, and checks that it computes what the model computes.

        The arguments and errors are those of `convert`.
        """
        file = with_weights(self.content, self.model, weight_bits, per_channel, kernels, metadata)
        if quantizers(self.model):
            verify(file, self.model, make_samples(self.model, self.input_shapes), kernels or ())
        return file


def calibrate(
    model: keras.Model,
    calibration: Any = None,
    inference_type: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> CalibratedFile:
    """Runs TensorFlow's converter once, for files that differ in their weights only; see `CalibratedFile`.

    The arguments and errors are those of `convert`.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> tflite.calibrate(model, np.ones([1, 8, 8, 3])).input_shapes
      [(8, 8, 3)]
    """
    inference_type = resolve_inference_type(inference_type, activation_bits(model))
    check_fused(model)
    check_not_recurrent(model)
    if not quantizers(model):
        samples = read_samples(calibration, model)
        shapes = [array.shape[1:] for array in samples[0]]
        if image_size is not None and tuple(image_size) not in [shape[:2] for shape in shapes]:
            raise ValueError(
                f"image_size is {tuple(image_size)}, but the calibration images are {shapes[0]}; a float model has the "
                "size of its calibration images in the file"
            )
        return _calibrate_float(model, samples, shapes, inference_type)
    if calibration is not None:
        raise ValueError("the model holds its own calibration ranges; leave calibration out")
    _check_ranges(model)
    shapes = _input_shapes(model, image_size)
    file = _convert_quantized(model, shapes, inference_type)
    if names := converter.find_float_tensors(file):
        raise ValueError(
            f"the file would compute {names[0]!r} in float; put an ActivationQuantizer after every operation, as "
            "tf_repvgg.quantization.quantize_activations does"
        )
    return CalibratedFile(file, model, shapes)


def _convert_quantized(model, shapes, inference_type):
    tensorflow_converter = converter.make_integer_converter(
        model, shapes, activation_bits(model), INFERENCE_TYPES[inference_type], run_on_shared_grids
    )
    return converter.run(tensorflow_converter)


def _calibrate_float(model, samples, shapes, inference_type):
    expected = model
    try:
        calibrated = ptq.calibrate(model, dict(zip(graph.input_names(model), stack_samples(samples), strict=True)))
    except graph.CopyError:
        pass
    else:
        file = _convert_quantized(calibrated, shapes, inference_type)
        if not converter.find_float_tensors(file):
            return CalibratedFile(file, calibrated, shapes)
        model = lower(model)  # of other constants, TensorFlow's converter would make other weights than the model's
        samples = [
            [array.astype(tensor.dtype.as_numpy_dtype) for array, tensor in zip(sample, model.inputs, strict=True)]
            for sample in samples
        ]
    # Operations inside of a user's own layers have no quantizers. TensorFlow calibrates them, and may fold constants
    # into biases, which `with_weights` keeps.
    file = converter.run(converter.make_calibrating_converter(model, samples, INFERENCE_TYPES[inference_type]))
    verify_outputs(file, expected, samples)
    return CalibratedFile(file, model, shapes)


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


def _check_ranges(model):
    for quantizer in quantizers(model):
        if not np.all(np.isfinite(quantizer.range.numpy())):
            raise ValueError(f"{quantizer.name!r} has no range yet; train the model, or quantize it by a method of ptq")


def _input_shapes(model, image_size=None):
    """Shape of one sample of each input, with the given size in place of free height and width."""
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    if image_size is not None:
        free = [shape[:2] == (None, None) for shape in shapes]
        if not any(free):
            raise ValueError(f"image_size is {tuple(image_size)}, but the model's input has the fixed size {shapes[0]}")
        shapes = [(*image_size, shape[-1]) if is_free else shape for is_free, shape in zip(free, shapes, strict=True)]
    for name, shape in zip(model.input_names, shapes, strict=True):
        if None in shape:
            raise ValueError(
                f"the model's input {name!r} is {shape}; a file needs a fixed size: give image_size=(height, width)"
            )
    return shapes


def convert_float(model: keras.Model, image_size: tuple[int, int] | None = None) -> bytes:
    """Writes a fused model as a float32 file of batch 1, the input of other quantization tools.

    Args:
      model: Deploy-form model.
      image_size: Height and width for a model that leaves them free.

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
    return converter.run(converter.make_converter(model, _input_shapes(model, image_size)))
