"""Running TFLite files in LiteRT."""

import concurrent.futures
import os
import time
from typing import NamedTuple

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tqdm import tqdm

from tf_repvgg import native_output

_WARMUP_RUNS = 10


class Latency(NamedTuple):
    """Milliseconds of one inference on one image."""

    p50_ms: float
    p90_ms: float
    runs: int
    threads: int


def _interpreter(file, threads):
    with native_output.hidden():  # it tells of its delegate each time
        interpreter = Interpreter(model_content=file, num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


def _quantized(images, details):
    """Float images in the type and scale of an input tensor."""
    dtype = details["dtype"]
    if dtype == np.float32:
        return images
    scale, zero_point = details["quantization"]
    limits = np.iinfo(dtype)
    return np.clip(np.round(images / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantized(outputs, details):
    if details["dtype"] == np.float32:
        return outputs
    scale, zero_point = details["quantization"]
    return (outputs.astype(np.float32) - zero_point) * np.float32(scale)


def predict(file: bytes, images, description: str | None = None) -> np.ndarray | list[np.ndarray]:
    """Runs a file of batch 1 on every image, one interpreter per core.

    Args:
      file: bytes of a TFLite file with one input.
      images: float32 array [count, height, width, channels], normalised; quantized here as the input asks.
      description: label of a progress bar; None for no bar.

    Returns:
      float32 array [count, ...]: the dequantized outputs. Of a file with several, a list of such arrays in the order
      of tf.nest.flatten(model.output): dictionaries by sorted keys.
    """
    workers = os.cpu_count() or 1
    interpreters = [_interpreter(file, threads=1) for _ in range(workers)]
    chunks = np.array_split(np.arange(len(images)), workers)
    with tqdm(total=len(images), desc=description, unit="image", disable=description is None, leave=False) as bar:

        def run(interpreter, indices):
            (input_details,) = interpreter.get_input_details()
            all_details = interpreter.get_output_details()
            outputs = [np.empty([len(indices), *details["shape"][1:]], details["dtype"]) for details in all_details]
            for row, index in enumerate(indices):
                interpreter.set_tensor(input_details["index"], _quantized(images[index : index + 1], input_details))
                interpreter.invoke()
                for output, details in zip(outputs, all_details, strict=True):
                    output[row] = interpreter.get_tensor(details["index"])[0]
                bar.update()
            return [_dequantized(output, details) for output, details in zip(outputs, all_details, strict=True)]

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(run, interpreters, chunks))
    outputs = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return outputs[0] if len(outputs) == 1 else outputs


def latency(file: bytes, threads: int = 1, runs: int = 100) -> Latency:
    """Times single inferences on random input, after a warm-up."""
    interpreter = _interpreter(file, threads)
    (details,) = interpreter.get_input_details()
    noise = np.random.default_rng(0).uniform(-1, 1, details["shape"]).astype(np.float32)
    interpreter.set_tensor(details["index"], _quantized(noise, details))
    times = []
    for _ in range(_WARMUP_RUNS + runs):
        started = time.perf_counter()
        interpreter.invoke()
        times.append(1000 * (time.perf_counter() - started))
    p50, p90 = np.percentile(times[_WARMUP_RUNS:], [50, 90])
    return Latency(float(p50), float(p90), runs, threads)
