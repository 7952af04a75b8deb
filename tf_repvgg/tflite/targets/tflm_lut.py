"""TFLite Micro with codebooks: weights as indices of 1 to 7 bits into tables of int8 values."""

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import re

import numpy as np

from tf_repvgg import native_output
from tf_repvgg.tflite import flatbuffer, reader
from tf_repvgg.tflite.interpreter import dequantize_output, quantize_input
from tf_repvgg.tflite.targets.base import Built, Weights, integer_weights, optional_module

PACKAGE, MODULE = "tflite-micro", "tflite_micro"
_MAX_BITS = 7
# Beside the tables of a tensor, its DECODE operator reads a header of so many bytes.
_HEADER_BYTES = 16
# For interpreters on this machine; what a file needs is measured.
_ARENA_BYTES = 2**28


def build(file: bytes) -> Built:
    """Compresses every weight tensor that gets smaller by it, per tensor or per channel as its scales are.

    The bits of a tensor's indices follow from how many distinct codes it has, per channel from the channel with the
    most. Tensors that would grow, and those of more than 128 codes, are left alone.

    Raises:
      ValueError: without the package tflite-micro, for a file that is not fully integer, and if all tensors have more
        than 128 codes.
    """
    tflm = optional_module(MODULE, PACKAGE)
    spec = optional_module(f"{MODULE}.tensorflow.lite.micro.compression.spec", PACKAGE)
    model = flatbuffer.unpack(file)
    weights = integer_weights(model)
    if all(states_of(each) > 2**_MAX_BITS for each in weights):
        raise ValueError(
            f"every layer has more than {2**_MAX_BITS} distinct codes ({weights[0].name!r} {states_of(weights[0])}), "
            "which no table holds; quantize with fewer states"
        )
    builder, layers = tflm.compression.SpecBuilder(), []
    for each in weights:
        bits, compressed = compressed_size(each)
        is_smaller = compressed < each.codes.size
        layers.append(
            {
                "tensor": each.name,
                "weights": each.codes.size,
                "codes": states_of(each),
                "index_bits": bits if is_smaller else None,
                "bytes": compressed if is_smaller else each.codes.size,
            }
        )
        if is_smaller:
            mode = spec.PerChannel(axis=each.layout.channel_axis) if each.is_per_channel else spec.PerTensor()
            builder.add_tensor(0, each.index).with_lut(bits, mode)
    packed = bytes(tflm.compression.compress(file, builder.build())) if any(x["index_bits"] for x in layers) else file
    uncompressed = len(file) - sum(x["weights"] for x in layers)
    facts = {
        "layers": layers,
        "weight_bytes": sum(x["bytes"] for x in layers),
        "int8_weight_bytes": sum(x["weights"] for x in layers),
        "file_bytes": len(packed),
        "file_over_bound": round(len(packed) / (sum(x["bytes"] for x in layers) + uncompressed), 4),
        "arena_bytes": arena_bytes(packed),
        "arena_bytes_of_int8_file": arena_bytes(file),
    }
    files = {"_lut.tflite": packed, "_lut.cc": c_array(packed), "_lut.h": C_HEADER}
    return Built(files, facts, functools.partial(predict, packed), functools.partial(predict, file))


def states_of(weights: Weights) -> int:
    """Distinct codes; per channel, of the channel with the most."""
    return reader.distinct_codes(weights.codes, weights.is_per_channel)


def compressed_size(weights: Weights) -> tuple[int, int]:
    """(bits of an index, bytes of indices and tables); codes that no index reaches count as uncompressed."""
    states = states_of(weights)
    bits = max(1, int(np.ceil(np.log2(states))))
    if bits > _MAX_BITS:
        return bits, weights.codes.size
    tables = weights.codes.shape[-1] if weights.is_per_channel else 1
    return bits, -(-weights.codes.size * bits // 8) + tables * states + _HEADER_BYTES


def arena_bytes(file: bytes) -> int:
    """The bytes of tensor arena that TFLite Micro takes to run a file, by its own account.

    Raises:
      ValueError: if it gives none, as for a file that it cannot run.
    """
    interpreter = _interpreter(file)
    with native_output.capture() as printed:
        interpreter.print_allocations()
    found = re.search(r"Arena allocation total (\d+) bytes", printed())
    if not found:
        raise ValueError("TFLite Micro does not tell how large an arena the file needs")
    return int(found[1])


def _interpreter(file):
    runtime = optional_module(MODULE, PACKAGE).runtime
    with native_output.hide():
        return runtime.Interpreter.from_bytes(file, arena_size=_ARENA_BYTES + len(file))


def predict(file: bytes, images) -> np.ndarray:
    """Runs a file of batch 1 on every image in TFLite Micro, one process per core; as `tf_repvgg.tflite.predict`.

    Its reference kernels are slow, and its interpreter for Python lets no other thread run meanwhile.
    """
    workers = min(os.cpu_count() or 1, len(images))
    # Forked, not spawned: a process that imports TensorFlow first would take seconds for each batch.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return np.concatenate(list(pool.map(_predict, itertools.repeat(file), np.array_split(images, workers))))


def _predict(file, images):
    interpreter = _interpreter(file)
    input_end, output_end = (
        {"dtype": np.dtype(end["dtype"]).type, "quantization": _only(end["quantization_parameters"])}
        for end in (interpreter.get_input_details(0), interpreter.get_output_details(0))
    )
    outputs = []
    for image in images:
        interpreter.set_input(quantize_input(image[np.newaxis], input_end), 0)
        interpreter.invoke()
        outputs.append(interpreter.get_output(0)[0])
    return dequantize_output(np.stack(outputs), output_end)


def _only(parameters):
    (scale,), (zero_point,) = parameters["scales"], parameters["zero_points"]
    return scale, zero_point


C_HEADER = b"""// The model of the .cc file of the same name, for TFLite Micro.
#pragma once
extern const unsigned char g_model[];
extern const unsigned int g_model_bytes;
"""


def c_array(content: bytes) -> bytes:
    """A C++ source that defines `g_model`, aligned to 16 bytes as the format asks, and `g_model_bytes`."""
    rows = (content[start : start + 16] for start in range(0, len(content), 16))
    lines = ",\n".join("  " + ", ".join(f"0x{byte:02x}" for byte in row) for row in rows)
    return f"""// Written by tf_repvgg; DECODE and the operators of the model must be registered with the interpreter.
alignas(16) extern const unsigned char g_model[] = {{
{lines}
}};
extern const unsigned int g_model_bytes = {len(content)};
""".encode()
