"""The integer files that export/main.py makes from one model: the flags that describe them, and how they are made."""

import dataclasses
import functools
import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

# Before TensorFlow and Keras, so that they start without messages.
from tf_repvgg import cli, provenance, storage, tflite

# isort: split
import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import flags

from tf_repvgg.quantization import ptq, quantizers
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.uniform import GRANULARITIES
from tf_repvgg.tflite.weights import describe_wide_weights

FLAGS = flags.FLAGS

# As good as min_max on CIFAR-10, and much better on ImageNet's photographs; see docs/ptq.md. Its files have no method
# in their names.
DEFAULT_METHOD = "relative+bias_correct"
flags.DEFINE_list("weight_bits", ["8"], "Widths of the uniform weight grid, from 2 to 8; one file for each.")
flags.DEFINE_list(
    "granularity", ["per_channel"], "Granularities of weight scales, per_tensor or per_channel; one file for each."
)
flags.DEFINE_string(
    "ptq",
    DEFAULT_METHOD,
    f"Method of post-training quantization: {', '.join(ptq.METHODS)}; or several in a row, as in equalize+adaquant.",
)
flags.DEFINE_string(
    "layer_bits", None, "Widths of weights in layers that differ from --weight_bits, by name pattern: stem=8,logits=8."
)
flags.DEFINE_integer(
    "ptq_iterations", ptq.Options.iterations, "Optimizer steps for each layer, in methods that learn.", lower_bound=1
)
flags.DEFINE_integer(
    "number_of_clusters",
    None,
    "Number of clusters of each codebook, by default 2^bits.",
    lower_bound=2,
    upper_bound=256,
)
flags.DEFINE_integer("ptq_seed", 0, "Seed of methods that learn.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_enum("activation_bits", "8", ["8", "16"], "Bits of activations, the input included.")
flags.DEFINE_enum(
    "inference_type",
    None,
    list(tflite.INFERENCE_TYPES),
    "Type of the file's input and output; by default that of its activations, int8 or int16.",
)

# Flags that shape files of a float model only: training has quantized the other models already.
_FLOAT_MODEL_FLAGS = (
    *("fit", "weight_bits", "granularity", "layer_bits"),
    *("ptq", "ptq_iterations", "ptq_seed", "number_of_clusters", "activation_bits"),
)
_WEIGHT_BITS = tuple("2345678")
# Images on which the activations of each layer are compared with the float model's.
_FIDELITY_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of the flags; names are those of the flags.

    Attributes:
      weight_bits: Widths of the uniform weight grid; one file for each, and for each granularity.
      granularities: Names of granularities.
      layer_bits: Widths in some layers, by name pattern; None for the same width in all.
      ptq: Method of post-training quantization, or several joined by "+".
      ptq_iterations: Optimizer steps for each layer.
      ptq_seed: Seed of methods that learn.
      number_of_clusters: Number of clusters of each codebook; None for 2^bits.
      activation_bits: Bits of activations.
      inference_type: Type of input and output; None for that of the activations.
    """

    weight_bits: tuple[int, ...]
    granularities: tuple[str, ...]
    layer_bits: str | None
    ptq: str
    ptq_iterations: int
    ptq_seed: int
    number_of_clusters: int | None
    activation_bits: int
    inference_type: str | None

    @property
    def needs_one_calibration(self) -> bool:
        """Whether one calibration serves all files, so that only weights need to be rounded."""
        return self.ptq == "min_max" and self.layer_bits is None and self.activation_bits == 8

    def bits_by_pattern(self, bits: int) -> str:
        """Widths of the layers in the file for one of `weight_bits`, by name pattern."""
        return ",".join(filter(None, [self.layer_bits, f".*={bits}"]))


@dataclasses.dataclass(frozen=True)
class Request:
    """A model and the integer files to make from it.

    Attributes:
      settings: Values of the flags.
      model: Fused float model, or a quantized model.
      model_sha256: Hash of the file from which the model was loaded.
      calibration: Normalized calibration images.
      input_range: Lowest and highest value of a normalized image.
      metadata: Content that is stored in every file.
    """

    settings: Settings
    model: keras.Model
    model_sha256: str
    calibration: tf.data.Dataset
    input_range: tuple[float, float]
    metadata: dict[str, Any]

    @property
    def is_quantized(self) -> bool:
        """Whether the model has been trained with quantization."""
        return bool(quantizers(self.model))

    @functools.cached_property
    def file_model(self) -> keras.Model:
        """The model as it is in the files. Layers such as Rescaling, which tell the scale of images, are gone there."""
        return self.model if self.is_quantized else lower(self.model)

    @property
    def is_resumable(self) -> bool:
        """Whether the files take so long that they are kept for the case that the run is interrupted."""
        return not (self.is_quantized or self.settings.needs_one_calibration)

    @property
    def activation_bits(self) -> int:
        """Bits of activations in the files."""
        return tflite.activation_bits(self.model) if self.is_quantized else self.settings.activation_bits

    @property
    def inference_type(self) -> str:
        """Type of the files' input and output."""
        return tflite.resolve_inference_type(self.settings.inference_type, self.activation_bits)

    @functools.cached_property
    def calibration_images(self) -> list[np.ndarray]:
        """All calibration images."""
        return list(self.calibration.as_numpy_iterator())

    @functools.cached_property
    def fidelity_images(self) -> np.ndarray:
        """Images on which the activations of each layer are compared, [count, height, width, channels]."""
        return np.stack(list(self.calibration.take(_FIDELITY_IMAGES).as_numpy_iterator()))


@dataclasses.dataclass(frozen=True)
class IntegerFile:
    """An integer file.

    Attributes:
      name: Name of the file.
      record: Description for export.json: how the file was made, and the fidelity of its layers.
      content: Content of the file.
    """

    name: str
    record: dict[str, Any]
    content: bytes


def read_settings() -> Settings:
    """Reads the flags.

    Raises:
      ValueError: If a flag has a value that its type allows and its meaning does not.
    """
    unknown = [name for name in FLAGS.granularity if name not in GRANULARITIES]
    if unknown or not FLAGS.granularity:
        raise ValueError(f"--granularity is {','.join(FLAGS.granularity)!r}; known: {', '.join(GRANULARITIES)}")
    if not FLAGS.weight_bits or not set(FLAGS.weight_bits) <= set(_WEIGHT_BITS):
        raise ValueError(f"--weight_bits is {','.join(FLAGS.weight_bits)!r}; use whole numbers from 2 to 8")
    if FLAGS.layer_bits and not all("=" in part for part in FLAGS.layer_bits.split(",")):
        raise ValueError(f"--layer_bits is {FLAGS.layer_bits!r}; use pattern=bits, as in stem=8,logits=8")
    ptq.parse_method(FLAGS.ptq)
    return Settings(
        weight_bits=tuple(dict.fromkeys(map(int, FLAGS.weight_bits))),
        granularities=tuple(dict.fromkeys(FLAGS.granularity)),
        layer_bits=FLAGS.layer_bits,
        ptq=FLAGS.ptq,
        ptq_iterations=FLAGS.ptq_iterations,
        ptq_seed=FLAGS.ptq_seed,
        number_of_clusters=FLAGS.number_of_clusters,
        activation_bits=int(FLAGS.activation_bits),
        inference_type=FLAGS.inference_type,
    )


def check_request(request: Request) -> None:
    """Checks that the settings fit the model.

    Raises:
      ValueError: If they do not.
    """
    if request.is_quantized:
        for name in _FLOAT_MODEL_FLAGS:
            if FLAGS[name].value != FLAGS[name].default:
                raise ValueError(
                    f"--{name}={FLAGS[name].value} does not go with a model that was trained quantized; leave it out"
                )
    tflite.resolve_inference_type(request.settings.inference_type, request.activation_bits)
    if not request.is_quantized:
        ptq.bits_by_layer(request.file_model, request.settings.bits_by_pattern(request.settings.weight_bits[0]))
        ptq.check_data_free(request.file_model, request.settings.ptq)


def make_files(request: Request, finished_work: storage.FinishedWork) -> Iterator[IntegerFile]:
    """Makes the files one after the other.

    Args:
      request: The model, and the files to make from it.
      finished_work: Files that an interrupted run of the same command has made, if the request is resumable.

    Yields:
      Each file as soon as it is made.
    """
    if request.is_quantized:
        yield convert_quantized(request)
    elif request.is_resumable:
        yield from quantize(request, finished_work)
    else:
        yield from round_weights(request)


def convert_quantized(request: Request) -> IntegerFile:
    """Makes the one file of a quantized model, with its codes and ranges."""
    with cli.bad_input_exits():
        content = tflite.convert(request.model, inference_type=request.inference_type, metadata=request.metadata)
    record = {"weights": "as trained", "layers": compare_layers(content, request.model, request)}
    return IntegerFile(f"{request.inference_type}_trained.tflite", record, content)


def round_weights(request: Request) -> Iterator[IntegerFile]:
    """Makes a file for every width and granularity, with weights by min-max; activations are calibrated once."""
    with cli.bad_input_exits():
        calibrated = tflite.calibrate(request.model, request.calibration, request.inference_type)
    for bits, granularity in _widths_and_granularities(request):
        started = time.monotonic()
        with cli.bad_input_exits():
            content = calibrated.with_weights(bits, granularity == "per_channel", metadata=request.metadata)
        record = _describe(request, bits, granularity, started)
        if wide := tflite.find_wide_weights(content, bits):
            record["notes"] = [describe_wide_weights(wide)]
        record["layers"] = compare_layers(content, request.file_model, request)
        yield IntegerFile(_name_file(request, bits, granularity), record, content)


def quantize(request: Request, finished_work: storage.FinishedWork) -> Iterator[IntegerFile]:
    """Makes a file for every width and granularity by a method of post-training quantization."""
    settings = request.settings
    images = request.calibration_images if ptq.needs_calibration(settings.ptq) else None
    inputs = describe_inputs(request, images)
    for bits, granularity in _widths_and_granularities(request):
        name = _name_file(request, bits, granularity)
        inputs |= {"weight_bits": settings.bits_by_pattern(bits), "granularity": granularity}
        if (finished := finished_work.find(name, inputs)) is not None:
            print(f"{name}: taken from the run that was interrupted", file=sys.stderr)
            yield IntegerFile(name, finished["record"], finished_work.read_content(name))
            continue
        file = _quantize_once(request, images, bits, granularity, name)
        finished_work.keep(name, inputs, {"record": file.record}, file.content)
        yield file


def describe_inputs(request: Request, images: list[np.ndarray] | None) -> dict[str, Any]:
    """Everything that files depend on beside bits and granularity, JSON-serializable.

    Args:
      request: The model, and the files to make from it.
      images: Calibration images; None for methods that need none.
    """
    settings = dataclasses.asdict(request.settings)
    for name in ("weight_bits", "granularities", "layer_bits"):
        del settings[name]
    return {
        "model_sha256": request.model_sha256,
        "sources_sha256": provenance.sources_sha256(),
        "tensorflow": provenance.machine()["tensorflow"],
        "calibration_sha256": images and _hash_images(images),
        "fidelity_images_sha256": _hash_images(request.fidelity_images),
        "input_range": request.input_range,
        "settings": settings,
        "metadata": request.metadata,
    }


def _hash_images(images):
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def _quantize_once(request, images, bits, granularity, name):
    settings, started = request.settings, time.monotonic()
    with cli.bad_input_exits():
        network = ptq.quantize_network(
            request.model,
            settings.ptq,
            settings.bits_by_pattern(bits),
            granularity == "per_channel",
            images,
            iterations=settings.ptq_iterations,
            number_of_clusters=settings.number_of_clusters,
            activation_bits=settings.activation_bits,
            input_range=request.input_range,
            seed=settings.ptq_seed,
            progress=True,
        )
        content = tflite.convert(network.quantized, inference_type=request.inference_type, metadata=request.metadata)
    record = _describe(request, bits, granularity, started)
    record |= {"layer_bits": settings.layer_bits, "notes": network.notes}
    # Not compared with the request's model: methods such as equalize change the float weights before they are rounded.
    record["layers"] = compare_layers(content, network.float, request)
    return IntegerFile(name, record, content)


def _name_file(request, bits, granularity):
    method = request.settings.ptq
    suffix = "" if method == DEFAULT_METHOD else f"_{method.replace('+', '_')}"
    return f"{request.inference_type}_w{bits}_{granularity}{suffix}.tflite"


def _widths_and_granularities(request):
    return itertools.product(request.settings.weight_bits, request.settings.granularities)


def _describe(request, bits, granularity, started) -> dict[str, Any]:
    return {
        "weight_bits": bits,
        "granularity": granularity,
        "ptq": request.settings.ptq,
        "quantization_seconds": round(time.monotonic() - started, 1),
    }


def compare_layers(content: bytes, model: keras.Model, request: Request) -> list[dict[str, Any]]:
    """The fidelity of each layer, for JSON.

    Args:
      content: Integer file.
      model: Float model that was rounded.
      request: Request of the file.
    """
    return [dataclasses.asdict(layer) for layer in tflite.layers(content, model, request.fidelity_images)]
