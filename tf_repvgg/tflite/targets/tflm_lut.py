"""TFLite Micro with codebooks: weights as indices of 1 to 7 bits into tables of int8 values."""

import contextlib
import functools
import os
import re
from typing import Any

import numpy as np

from tf_repvgg import native_output
from tf_repvgg.tflite import flatbuffer, reader
from tf_repvgg.tflite.clean_process import RemoteObject
from tf_repvgg.tflite.interpreter import dequantize_output, quantize_input
from tf_repvgg.tflite.targets.base import Built, Weights, integer_weights, optional_module

PACKAGE, MODULE = "tflite-micro", "tflite_micro"
_MAX_BITS = 7
# Beside the tables of a tensor, its DECODE operator reads a header of so many bytes.
_HEADER_BYTES = 16
# For interpreters on this machine; the arena that a file needs is measured.
_ARENA_BYTES = 2**28


def build(file: bytes) -> Built:
    """Compresses every weight tensor that becomes smaller, per tensor or per channel as its scales are.

    The number of distinct codes of a tensor determines the bits of its indices; per channel, the channel with the most
    does. Tensors that would grow, and those of more than 128 codes, stay as they are.

    Raises:
      ValueError: If the package tflite-micro is not installed, the file is not fully integer, or all tensors have more
        than 128 codes.
    """
    tflm = optional_module(MODULE, PACKAGE)
    spec = optional_module(f"{MODULE}.tensorflow.lite.micro.compression.spec", PACKAGE)
    all_weights = integer_weights(flatbuffer.unpack(file))
    if all(count_codes(weights) > 2**_MAX_BITS for weights in all_weights):
        first = all_weights[0]
        raise ValueError(
            f"every layer has more than {2**_MAX_BITS} distinct codes ({first.name!r} {count_codes(first)}), "
            "which no table holds; quantize with fewer clusters"
        )
    builder, layers = tflm.compression.SpecBuilder(), []
    for weights in all_weights:
        layers.append(_describe(weights))
        if (bits := layers[-1]["index_bits"]) is not None:
            mode = spec.PerChannel(axis=weights.layout.channel_axis) if weights.is_per_channel else spec.PerTensor()
            builder.add_tensor(0, weights.index).with_lut(bits, mode)
    is_compressed = any(layer["index_bits"] for layer in layers)
    packed = bytes(tflm.compression.compress(file, builder.build())) if is_compressed else file
    weight_bytes, int8_weight_bytes = (sum(layer[key] for layer in layers) for key in ("bytes", "weights"))
    record = {
        "layers": layers,
        "weight_bytes": weight_bytes,
        "int8_weight_bytes": int8_weight_bytes,
        "file_bytes": len(packed),
        "file_over_bound": round(len(packed) / (weight_bytes + len(file) - int8_weight_bytes), 4),
        "arena_bytes": arena_bytes(packed),
        "arena_bytes_of_int8_file": arena_bytes(file),
    }
    files = {"_lut.tflite": packed, "_lut.cc": c_array(packed), "_lut.h": C_HEADER}
    return Built(files, record, functools.partial(predict, packed), functools.partial(predict, file))


def _describe(weights: Weights) -> dict[str, Any]:
    bits, compressed_bytes = size_with_tables(weights)
    is_smaller = compressed_bytes < weights.codes.size
    return {
        "tensor": weights.name,
        "weights": weights.codes.size,
        "codes": count_codes(weights),
        "index_bits": bits if is_smaller else None,
        "bytes": compressed_bytes if is_smaller else weights.codes.size,
    }


def count_codes(weights: Weights) -> int:
    """Number of distinct codes; per channel, that of the channel with the most."""
    return reader.distinct_codes(weights.codes, weights.is_per_channel)


def size_with_tables(weights: Weights) -> tuple[int, int]:
    """Size of a weight tensor with tables.

    Returns:
      (bits of an index, bytes of indices and tables). A tensor with too many codes for tables keeps its bytes.
    """
    tables = weights.codes.shape[-1] if weights.is_per_channel else 1
    return compute_size(weights.codes.size, count_codes(weights), tables)


def compute_size(weights: int, codes: int, tables: int) -> tuple[int, int]:
    """Size of a number of weights with tables.

    Args:
      weights: Number of weights.
      codes: Number of distinct codes in a table.
      tables: Number of tables.

    Returns:
      (bits of an index, bytes of indices and tables); as many bytes as weights if there are too many codes for tables.
    """
    bits = max(1, int(np.ceil(np.log2(codes))))
    if bits > _MAX_BITS:
        return bits, weights
    return bits, -(-weights * bits // 8) + tables * codes + _HEADER_BYTES


def arena_bytes(file: bytes) -> int:
    """Bytes of tensor arena that TFLite Micro reports for a file.

    Raises:
      ValueError: If it reports none, as for a file that it cannot run.
    """
    interpreter = _load_interpreter(file)
    with native_output.capture() as read_output:
        interpreter.print_allocations()
    match = re.search(r"Arena allocation total (\d+) bytes", read_output())
    if not match:
        raise ValueError("TFLite Micro does not report how large an arena the file needs")
    return int(match[1])


def _load_interpreter(file):
    runtime = optional_module(MODULE, PACKAGE).runtime
    with native_output.hide():
        return runtime.Interpreter.from_bytes(file, arena_size=_ARENA_BYTES + len(file))


def predict(file: bytes, images: np.ndarray) -> np.ndarray:
    """Runs a file of batch 1 on every image in TFLite Micro, in one process for each core.

    Its reference kernels are slow, and its interpreter for Python blocks all other threads.

    Args:
      file: Integer file with one input and one output.
      images: Normalized images, float32 [count, height, width, channels].

    Returns:
      The dequantized outputs, float32 [count, ...].

    Raises:
      RuntimeError: If TFLite Micro cannot run the file, or crashes.
    """
    workers = min(os.cpu_count() or 1, len(images))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(RemoteObject(_LoadedFile, file)) for _ in range(workers)]
        for remote_file, chunk in zip(files, np.array_split(images, workers), strict=True):
            remote_file.start_call("predict", chunk)
        return np.concatenate([remote_file.wait() for remote_file in files])


class _LoadedFile:
    """A file that TFLite Micro has loaded."""

    def __init__(self, file):
        self._interpreter = _load_interpreter(file)

    def predict(self, images):
        input_details = _convert_details(self._interpreter.get_input_details(0))
        outputs = []
        for image in images:
            self._interpreter.set_input(quantize_input(image[np.newaxis], input_details), 0)
            self._interpreter.invoke()
            outputs.append(self._interpreter.get_output(0)[0])
        return dequantize_output(np.stack(outputs), _convert_details(self._interpreter.get_output_details(0)))


def _convert_details(details):
    """TFLite Micro's details of a tensor in the form of LiteRT's."""
    parameters = details["quantization_parameters"]
    (scale,), (zero_point,) = parameters["scales"], parameters["zero_points"]
    return {"dtype": np.dtype(details["dtype"]).type, "quantization": (scale, zero_point)}


C_HEADER = b"""// The model of the .cc file of the same name, for TFLite Micro.
#pragma once
extern const unsigned char g_model[];
extern const unsigned int g_model_bytes;
"""


def c_array(content: bytes) -> bytes:
    """C++ source that defines `g_model`, aligned to 16 bytes as the format requires, and `g_model_bytes`."""
    rows = (content[start : start + 16] for start in range(0, len(content), 16))
    lines = ",\n".join("  " + ", ".join(f"0x{byte:02x}" for byte in row) for row in rows)
    return f"""// Written by tf_repvgg; DECODE and the operators of the model must be registered with the interpreter.
alignas(16) extern const unsigned char g_model[] = {{
{lines}
}};
extern const unsigned int g_model_bytes = {len(content)};
""".encode()
