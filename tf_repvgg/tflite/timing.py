"""Timing TFLite files of any tool in LiteRT, on random inputs."""

import time
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.random import Generator, default_rng  # now, so that its memory does not count for a file

from tf_repvgg.tflite.interpreter import load_interpreter, quantize_input

_WARMUP_RUNS = 10


class Latency(NamedTuple):
    """Time of one inference.

    Attributes:
      p50_ms: Median, in milliseconds.
      p90_ms: 90th percentile, in milliseconds.
      runs: Number of timed inferences.
      threads: Number of interpreter threads.

    Example:
      >>> from tf_repvgg.tflite import Latency
      >>> Latency(p50_ms=1.5, p90_ms=1.75, runs=100, threads=2).p90_ms
      1.75
    """

    p50_ms: float
    p90_ms: float
    runs: int
    threads: int


def latency(file: bytes, threads: int = 1, runs: int = 100) -> Latency:
    """Times single inferences on random input, after a warm-up.

    Args:
      file: TFLite file with any inputs. Its sizes are fixed, but for the batch, which is 1 if the file leaves it open.
      threads: Number of interpreter threads.
      runs: Number of timed inferences.

    Raises:
      ValueError: If an input has no fixed size, or a type of which there are no random values.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> latency = tflite.latency(tflite.convert(model, calibration=np.ones([1, 8, 8, 3])), runs=50)
      >>> 0 < latency.p50_ms <= latency.p90_ms
      True
    """
    interpreter = load_interpreter(file, threads)
    check_sizes(interpreter)
    fill_inputs(interpreter)
    measure_times(interpreter, _WARMUP_RUNS)
    p50, p90 = np.percentile(measure_times(interpreter, runs), [50, 90])
    return Latency(float(p50), float(p90), runs, threads)


def measure_times(interpreter: Interpreter, runs: int) -> list[float]:
    """Times inferences on the inputs that are set: milliseconds of each."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        interpreter.invoke()
        times.append(1000 * (time.perf_counter() - started))
    return times


def check_sizes(interpreter: Interpreter) -> None:
    """Refuses files with an input whose size is open, such as images of any height.

    Raises:
      ValueError: If an axis of an input has no size. The first axis may have none: it is the batch.
    """
    for details in interpreter.get_input_details():
        signature = [int(size) for size in details["shape_signature"]]
        if -1 in signature[1:]:
            sizes = ", ".join("?" if size == -1 else str(size) for size in signature)
            raise ValueError(
                f"input {details['name']!r} has shape [{sizes}]; convert the model with a fixed size, since only the "
                "batch may be open"
            )


def batch_of(interpreter: Interpreter) -> int:
    """Items of one inference: the first size of the first input that has two axes or more; 1 without such an input."""
    sizes = [int(details["shape"][0]) for details in interpreter.get_input_details() if len(details["shape"]) > 1]
    return sizes[0] if sizes else 1


def resize_batch(interpreter: Interpreter, batch: int) -> bool:
    """Resizes a file of batch 1 to another batch.

    Returns:
      Whether the file computes that batch now. If not, as with a recurrent state of fixed size, the interpreter is of
      no more use.
    """
    if batch == batch_of(interpreter):
        return True
    resizable = [
        details for details in interpreter.get_input_details() if len(details["shape"]) > 1 and details["shape"][0] == 1
    ]
    if not resizable:
        return False
    interpreter.invoke()  # shapes that depend on values are known only now
    output_shapes = _output_shapes(interpreter)
    try:
        for details in resizable:
            interpreter.resize_tensor_input(details["index"], [batch, *details["shape"][1:]])
        interpreter.allocate_tensors()
        fill_inputs(interpreter)
        interpreter.invoke()
    except RuntimeError:  # of LiteRT: an operator that does not fit
        return False
    # Outputs of other shapes: the file mixes the items of a batch, and is no file of so many items.
    return _output_shapes(interpreter) == [(batch, *shape[1:]) for shape in output_shapes]


def _output_shapes(interpreter):
    return [tuple(int(size) for size in details["shape"]) for details in interpreter.get_output_details()]


def fill_inputs(interpreter: Interpreter) -> None:
    """Sets every input to random values of its type.

    Raises:
      ValueError: If there are no random values of that type.
    """
    generator = default_rng(0)
    for details in interpreter.get_input_details():
        interpreter.set_tensor(details["index"], _make_input(details, generator))


def _make_input(details: dict[str, Any], generator: Generator) -> np.ndarray:
    shape, dtype = tuple(details["shape"]), np.dtype(details["dtype"])
    noise = generator.uniform(-1, 1, shape).astype(np.float32)
    if dtype.kind in "fc":
        return noise.astype(dtype)
    if dtype.kind in "iu":
        scale, _ = details["quantization"]
        if scale:
            return quantize_input(noise, details)
        # Whole numbers without a scale are pixels if they are small, and otherwise indices, of which 0 is always valid.
        if dtype.itemsize == 1:
            return generator.integers(0, 128, shape).astype(dtype)
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        return noise > 0
    raise ValueError(f"input {details['name']!r} is of type {dtype.name}, for which there are no random values")
