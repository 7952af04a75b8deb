"""Whether a way to a file is right, refused, or at fault."""

import dataclasses
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras

import tf_repvgg
from harness.any_model import bounds
from harness.any_model.random_models import run_model
from harness.any_model.ways import CONVERT, WAYS
from tf_repvgg import fusion, tflite
from tf_repvgg.quantization import lowering
from tf_repvgg.quantization.activations import quantizer_before
from tf_repvgg.tflite import flatbuffer

_LIBRARY = Path(tf_repvgg.__file__).parent

RIGHT, REFUSED = "right", "refused"
# Faults: a file that computes something else, whether or not the library itself notices; a refusal after the work; and
# any error that is not meant for users.
WRONG, REFUSED_LATE, CRASHED = "wrong", "refused late", "crashed"
OUTCOMES = (RIGHT, REFUSED, WRONG, REFUSED_LATE, CRASHED)
FAULTS = (WRONG, REFUSED_LATE, CRASHED)

# Accepted differences, as multiples of those that the bounds measure, plus a little for small ones: in steps of the
# output's grid, and in shares of the output's root mean square.
_MOST_OF_DISTURBED, _MORE_STEPS = 2.0, {8: 2.0, 16: 128.0}
_MOST_OF_NAIVE, _MORE_ERROR = 3.0, 0.01
# Where the first rounding does not explain an error, it may have been a lucky one: others follow.
_ROUNDINGS = 24
# Largest error of a form of the model that is the same function, in shares of the output's root mean square.
_SAME_FUNCTION = 1e-3
# Errors from these modules come too late, except from a trial before work begins.
_LATE_MODULES, _TRIAL_MODULE = ("tf_repvgg/converter.py", "tflite/weights.py"), "quantization/exportability.py"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one model on one way.

    Attributes:
      outcome: One of `OUTCOMES`.
      detail: Reason, in a line; empty if right.
      steps: Largest difference of the file from its quantized model, in steps of the output's grid; None without both.
      steps_allowed: Bound of `steps`.
      error: Root mean square of the file's error, as a share of that of the float outputs; None without a file.
      error_allowed: Bound of `error`.
    """

    outcome: str
    detail: str = ""
    steps: float | None = None
    steps_allowed: float | None = None
    error: float | None = None
    error_allowed: float | None = None


class _Fault(Exception):
    """The file is not what the way promises."""


def fuse(model: keras.Model) -> keras.Model:
    """The deploy form of a model; the model itself if there is nothing to fuse."""
    try:
        return fusion.fuse(model)
    except ValueError as error:
        if "nothing to fuse" not in str(error):
            raise
        return model


def judge(model: keras.Model, inputs: list[np.ndarray], outputs: list[np.ndarray], way_name: str) -> Verdict:
    """Takes a model to a file by one way, and holds the file against the model.

    A file is right if its outputs are those of the quantized Keras model within a few steps, on all images, and if its
    error is one that integers of so many bits explain. How much that is depends on the model: a network of many layers
    amplifies every rounding. Both bounds are therefore measured: the first by moving codes of the quantized model
    (`bounds.disturb`), the second by rounding the float model without the library (`bounds.round_naively`). A constant
    that is lost, a wrong bias or a layer on a wrong grid is several times beyond them.

    Args:
      model: Fused float model.
      inputs: Images, one array [count, ...] for each input, which serve for calibration too.
      outputs: Float outputs of the model as its user wrote it, each [count, ...].
      way_name: Name in `ways.WAYS`.
    """
    way, calibration, is_early = WAYS[way_name], make_calibration(model, inputs), True
    try:
        if way_name == CONVERT:
            quantized, file = None, tflite.convert(model, calibration)
            is_early = False
        else:
            quantized = way.quantize(model, calibration)
            is_early = False
            quantized = way.strip(quantized)
            file = tflite.convert(quantized)
        return _judge_file(file, model, quantized, inputs, outputs, way)
    except Exception as error:
        return judge_error(error, is_early)


def make_calibration(model: keras.Model, inputs: Sequence[np.ndarray]) -> Any:
    """The images in the form that calibration takes: an array, or for several inputs a list of tuples."""
    return inputs[0] if len(model.inputs) == 1 else list(zip(*inputs, strict=True))


def predict(file: bytes, model: keras.Model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a file in the order of `tf.nest.flatten` of the model's outputs."""
    outputs = tflite.predict(file, inputs[0] if len(inputs) == 1 else tuple(inputs))
    if not isinstance(outputs, dict):
        return [outputs]
    if isinstance(model.output, dict):
        return [outputs[name] for name in sorted(outputs)]
    return [outputs[f"output_{index}"] for index in range(len(outputs))]


def shorten_reason(message: str) -> str:
    """A message with names and numbers replaced, so that like reasons can be counted."""
    message = re.sub(r"(?<!\w)'[^']*'", "'...'", message)
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", message)


def measure_error(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> list[float]:
    """Root mean square of the differences over that of the expected values, for each output."""
    return [
        float(np.sqrt(np.mean(np.square(right - wrong, dtype=float)) / np.mean(np.square(right, dtype=float))))
        for right, wrong in zip(expected, actual, strict=True)
    ]


def judge_error(error: Exception, is_early: bool) -> Verdict:
    """The verdict on an error of the library.

    Args:
      error: The error, with its traceback.
      is_early: Whether it came before quantization had ended.
    """
    message = str(error)
    detail = f"{type(error).__name__}: {' '.join(message.split())}"
    if isinstance(error, tflite.WrongFileError | _Fault):
        return Verdict(WRONG, detail)
    frames = traceback.extract_tb(error.__traceback__)
    is_raised_by_library = Path(frames[-1].filename).is_relative_to(_LIBRARY) and (
        (frames[-1].line or "").startswith("raise ")
    )
    if not (isinstance(error, ValueError) and is_raised_by_library and "\n" not in message):
        place = "/".join(frames[-1].filename.split("/")[-2:])
        return Verdict(CRASHED, f"{detail[:300]} ({place}:{frames[-1].lineno})")
    is_trial = any(frame.filename.endswith(_TRIAL_MODULE) for frame in frames)
    is_late = not is_early or (not is_trial and any(frame.filename.endswith(_LATE_MODULES) for frame in frames))
    return Verdict(REFUSED_LATE if is_late else REFUSED, message)


def _judge_file(file, model, quantized, inputs, outputs, way):
    _check_weights(file, way, getattr(quantized, "quantization_notes", ()))
    actual = predict(file, model, inputs)
    shapes = [output.shape for output in outputs]
    if [output.shape for output in actual] != shapes:
        raise _Fault(f"the file's outputs have shapes {[output.shape for output in actual]}, the model's {shapes}")
    error, error_allowed = _compare_with_naive(model, inputs, outputs, actual, way)
    verdict = Verdict(RIGHT, error=error, error_allowed=error_allowed)
    if quantized is not None:
        steps, steps_allowed = _count_steps(quantized, inputs, actual)
        verdict = dataclasses.replace(verdict, steps=steps, steps_allowed=steps_allowed)
        if not steps <= steps_allowed:
            detail = f"the file differs by {steps:.1f} steps from its quantized model; {steps_allowed:.1f} are allowed"
            return dataclasses.replace(verdict, outcome=WRONG, detail=detail)
    if not error <= error_allowed:
        detail = f"the file's error is {error:.3f} of its outputs; {error_allowed:.3f} are allowed"
        return dataclasses.replace(verdict, outcome=WRONG, detail=detail)
    return verdict


def _compare_with_naive(model, inputs, outputs, actual, way):
    """(error, largest accepted one) of the output closest to its bound."""
    errors, largest = measure_error(outputs, actual), np.zeros(len(outputs))
    for form in _make_forms(model, inputs, outputs):
        for seed in (None, *range(_ROUNDINGS)):
            naive = bounds.round_naively(form, inputs, way.weight_bits, way.activation_bits, seed)
            largest = np.maximum(largest, measure_error(outputs, naive))
            allowed = _MOST_OF_NAIVE * largest + _MORE_ERROR
            if np.all(errors <= allowed):
                return max(zip(errors, allowed.tolist(), strict=True), key=lambda pair: pair[0] / pair[1])
    return max(zip(errors, allowed.tolist(), strict=True), key=lambda pair: pair[0] / pair[1])


def _make_forms(model, inputs, outputs):
    """The model, and the same function with constants folded: an offset that passes a rounded kernel has its error."""
    yield model
    lowered = lowering.lower(model)
    if max(measure_error(outputs, run_model(lowered, inputs))) < _SAME_FUNCTION:
        yield lowered


def _check_weights(file, way, notes):
    flat = flatbuffer.unpack(file)
    for subgraph in flat.subgraphs:
        for operator in subgraph.operators:
            layout = flatbuffer.weights_layout(flat, operator)
            if layout is None:
                continue
            tensor = flatbuffer.weights_tensor(subgraph, operator)
            codes, layer = flatbuffer.weight_codes(flat, tensor, layout), flatbuffer.weights_layer_name(tensor)
            if any(layer in note for note in notes):
                continue
            if way.largest_code is not None and np.max(np.abs(codes.astype(int))) > way.largest_code:
                raise _Fault(f"weights {layer!r} have codes beyond {way.largest_code}, and no note says so")
            if way.most_codes is not None and len(np.unique(codes)) > way.most_codes:
                raise _Fault(f"weights {layer!r} have more than {way.most_codes} codes, and no note says so")


def _count_steps(quantized, inputs, actual):
    """(largest difference in steps of the output's grid, largest accepted one) of the output closest to its bound."""
    expected, disturbed = run_model(quantized, inputs), bounds.disturb(quantized, inputs)
    pairs = []
    for tensor, *values in zip(quantized.outputs, expected, actual, disturbed, strict=True):
        quantizer, (right, file_output, moved) = quantizer_before(tensor), values
        step = quantizer.scale()
        steps, moved_steps = (float(np.max(np.abs(other - right))) / step for other in (file_output, moved))
        pairs.append((steps, _MOST_OF_DISTURBED * moved_steps + _MORE_STEPS[quantizer.bits]))
    return max(pairs, key=lambda pair: pair[0] / pair[1])
