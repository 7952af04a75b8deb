"""Running TFLite files in LiteRT."""

import concurrent.futures
import os
import time
from typing import NamedTuple

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tqdm import tqdm

from tf_repvgg import native_output

_WARMUP_RUNS = 10


class Latency(NamedTuple):
    """Milliseconds of one inference on one image."""

    p50_ms: float
    p90_ms: float
    runs: int
    threads: int


def load_interpreter(file: bytes, threads: int, default_delegate: bool = True, **options) -> Interpreter:
    """A file in LiteRT, its tensors allocated; see `predict`. Options are those of LiteRT's interpreter."""
    resolver = OpResolverType.AUTO if default_delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with native_output.hide():  # it tells of its delegate each time
        interpreter = Interpreter(
            model_content=file, num_threads=threads, experimental_op_resolver_type=resolver, **options
        )
        interpreter.allocate_tensors()
    return interpreter


def quantize_input(images, details):
    """Float images in the type and scale of an input tensor."""
    dtype = details["dtype"]
    if dtype == np.float32:
        return images
    scale, zero_point = details["quantization"]
    limits = np.iinfo(dtype)
    return np.clip(np.round(images / scale) + zero_point, limits.min, limits.max).astype(dtype)


def dequantize_output(outputs, details):
    if details["dtype"] == np.float32:
        return outputs
    scale, zero_point = details["quantization"]
    return (outputs.astype(np.float32) - zero_point) * np.float32(scale)


def _outputs(interpreter):
    """{name in the file's signature: details}; a single output needs no signature."""
    details = interpreter.get_output_details()
    # With several, the order of this list is the converter's own; only the signature tells which is which.
    return {"": details[0]} if len(details) == 1 else interpreter.get_signature_runner().get_output_details()


def predict(
    file: bytes, images, description: str | None = None, default_delegate: bool = True
) -> np.ndarray | dict[str, np.ndarray]:
    """Runs a file of batch 1 on every image, one interpreter per core.

    Args:
      file: bytes of a TFLite file with one input.
      images: float32 array [count, height, width, channels], normalised; quantized here as the input asks.
      description: label of a progress bar; None for no bar.
      default_delegate: whether XNNPACK runs what it can, or LiteRT's own kernels all, which round a little differently.

    Returns:
      float32 array [count, ...]: the dequantized outputs. Of a file with several outputs, a dictionary of such arrays:
      by the keys of the model's outputs, or "output_0" onwards where they are a list.
    """
    workers = os.cpu_count() or 1
    interpreters = [load_interpreter(file, 1, default_delegate) for _ in range(workers)]
    chunks = np.array_split(np.arange(len(images)), workers)
    with tqdm(total=len(images), desc=description, unit="image", disable=description is None, leave=False) as bar:

        def run(interpreter, indices):
            (input_details,) = interpreter.get_input_details()
            details = _outputs(interpreter)
            outputs = {name: np.empty([len(indices), *its["shape"][1:]], its["dtype"]) for name, its in details.items()}
            for row, index in enumerate(indices):
                interpreter.set_tensor(input_details["index"], quantize_input(images[index : index + 1], input_details))
                interpreter.invoke()
                for name, its in details.items():
                    outputs[name][row] = interpreter.get_tensor(its["index"])[0]
                bar.update()
            return {name: dequantize_output(outputs[name], its) for name, its in details.items()}

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(run, interpreters, chunks))
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return outputs.get("", outputs)


def intermediate(file: bytes, images, tensors: list[int]) -> list[np.ndarray]:
    """What a file of batch 1 and one input computes on the way, on LiteRT's own kernels.

    Args:
      file: bytes of a TFLite file.
      images: as for `predict`.
      tensors: indices of the tensors to keep.

    Returns:
      For each of them a float32 array [count, ...], dequantized.
    """
    # The delegate would keep to itself what lies between the operators that it runs.
    interpreter = load_interpreter(file, 1, default_delegate=False, experimental_preserve_all_tensors=True)
    (input_details,) = interpreter.get_input_details()
    details = {its["index"]: its for its in interpreter.get_tensor_details()}
    values = [[] for _ in tensors]
    for image in images:
        interpreter.set_tensor(input_details["index"], quantize_input(image[np.newaxis], input_details))
        interpreter.invoke()
        for kept, index in zip(values, tensors, strict=True):
            kept.append(interpreter.get_tensor(index)[0])
    return [dequantize_output(np.stack(kept), details[index]) for kept, index in zip(values, tensors, strict=True)]


def latency(file: bytes, threads: int = 1, runs: int = 100) -> Latency:
    """Times single inferences on random input, after a warm-up."""
    interpreter = load_interpreter(file, threads)
    (details,) = interpreter.get_input_details()
    noise = np.random.default_rng(0).uniform(-1, 1, details["shape"]).astype(np.float32)
    interpreter.set_tensor(details["index"], quantize_input(noise, details))
    times = []
    for _ in range(_WARMUP_RUNS + runs):
        started = time.perf_counter()
        interpreter.invoke()
        times.append(1000 * (time.perf_counter() - started))
    p50, p90 = np.percentile(times[_WARMUP_RUNS:], [50, 90])
    return Latency(float(p50), float(p90), runs, threads)
