"""The Coral Edge TPU: a check by the published rules of its compiler, and the compiler itself where it is installed.

The rules are those of the page "TensorFlow models on the Edge TPU" (coral.ai/docs/edgetpu/models-intro): 8-bit tensors
of fixed sizes, of which only the three innermost dimensions may be larger than 1, the listed operators within their
limits, and a graph that is cut at the first operator that is not mapped: all operators after it run on the CPU.
Operator versions are those that users have seen compiler 16.0 accept or refuse.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.targets.base import Built

COMPILER = "edgetpu_compiler"
# On-chip memory that caches parameters; parameters that do not fit are streamed over USB or PCIe in every inference.
CACHE_BYTES = 8 * 2**20
_INT8_TYPES = (schema.TensorType.INT8, schema.TensorType.UINT8)
_CODE = schema.BuiltinOperator
# Highest operator versions known to be accepted: google-coral/edgetpu issues 631 (CONV_2D 6 refused), 879 (QUANTIZE 3
# refused) and 845 (TRANSPOSE_CONV 4 refused).
_LAST_VERSION = {_CODE.CONV_2D: 5, _CODE.QUANTIZE: 2, _CODE.TRANSPOSE_CONV: 3}


def build(file: bytes) -> Built:
    """Reports for every operator whether it is mapped; runs `edgetpu_compiler` if it is on the PATH.

    Raises:
      ValueError: If the file is not a TFLite file, or the compiler refuses it.
    """
    record = check(file)
    if shutil.which(COMPILER) is None:
        return Built({}, record | {"compiler": f"{COMPILER} is not on the PATH: checked by the published rules only"})
    compiled, log = _run_compiler(file)
    return Built({"_edgetpu.tflite": compiled}, record | {"compiler": parse_log(log)})


def check(file: bytes) -> dict[str, Any]:
    """Applies the published rules to a file.

    Returns:
      Operators with the reasons why they are not mapped, and whether the parameters fit the cache.

    Raises:
      ValueError: If the file is not a TFLite file.
    """
    model = flatbuffer.unpack(file)
    file_reasons = _find_file_reasons(model)
    graph = model.subgraphs[0]
    operators, is_cut = [], bool(file_reasons)
    for operator in graph.operators:
        code = flatbuffer.operator_code(model, operator)
        reason = file_reasons[0] if file_reasons else _find_reason(model, graph, operator, code)
        if reason is None and is_cut:
            reason = "it comes after an operator that stays on the CPU"
        is_cut = is_cut or reason is not None
        operators.append({"operator": _operator_name(code), "is_mapped": reason is None, "reason": reason})
    parameters = _parameter_bytes(model, graph)
    mapped = sum(operator["is_mapped"] for operator in operators)
    return {
        "operators": operators,
        "mapped_operators": mapped,
        "cpu_operators": len(operators) - mapped,
        "parameter_bytes": parameters,
        "cache_bytes": CACHE_BYTES,
        "fits_cache": parameters <= CACHE_BYTES,
    }


def _operator_name(code):
    return next((name for name, value in vars(_CODE).items() if value == code), str(code))


def _find_file_reasons(model):
    """Reasons why nothing in the file would be mapped."""
    reasons = []
    if len(model.subgraphs) > 1:
        reasons.append(f"the file has {len(model.subgraphs)} subgraphs; one is mapped")
    graph = model.subgraphs[0]
    for role, indices in (("input", graph.inputs), ("output", graph.outputs)):
        for index in indices:
            tensor = graph.tensors[index]
            shape = [int(size) for size in tensor.shape]
            signature = shape if tensor.shapeSignature is None else [int(size) for size in tensor.shapeSignature]
            if -1 in signature or any(size <= 0 for size in shape):
                reasons.append(f"the {role} has no fixed size: {signature}")
            if shape and shape[0] != 1:
                reasons.append(f"the {role} is a batch of {shape[0]}; 1 is mapped")
    return reasons


def _find_reason(model, graph, operator, code):
    """The reason why an operator would stay on the CPU; None if it would be mapped."""
    if code not in _RULES:
        return "the compiler does not know the operator"
    version = model.operatorCodes[operator.opcodeIndex].version
    if version > _LAST_VERSION.get(code, version):
        return f"its version is {version}; the compiler knows up to {_LAST_VERSION[code]}"
    tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
    for tensor in tensors:
        name = flatbuffer.tensor_name(tensor)
        is_constant = model.buffers[tensor.buffer].data is not None
        if tensor.type not in _INT8_TYPES and not is_constant:
            return f"{name!r} is {_type_name(tensor.type)}; 8-bit integers are mapped"
        shape = [int(size) for size in tensor.shape]
        if not is_constant and any(size > 1 for size in shape[:-3]):
            return f"{name!r} has shape {shape}; only the three innermost sizes may be above 1"
    return _RULES[code](model, graph, operator)


def _type_name(number):
    return next(name for name, value in vars(schema.TensorType).items() if value == number).lower()


# Rules for one operator each: (model, graph, operator) -> the reason why it is not mapped, or None.


def _read_constant(model, graph, operator, position):
    tensor = graph.tensors[operator.inputs[position]]
    if model.buffers[tensor.buffer].data is None:
        return None
    return flatbuffer.constant(model, tensor, np.int32).reshape(-1)


def _check_convolution(model, graph, operator):
    options, filters = operator.builtinOptions, graph.tensors[operator.inputs[1]]
    channels = int(graph.tensors[operator.inputs[0]].shape[-1])
    if int(filters.shape[-1]) != channels:
        return f"it is grouped: its kernel takes {int(filters.shape[-1])} of {channels} channels"
    if options.dilationWFactor != options.dilationHFactor:
        return f"its dilations differ: {options.dilationHFactor} and {options.dilationWFactor}"
    return None


def _check_depthwise(model, graph, operator):
    options = operator.builtinOptions
    if max(options.dilationWFactor, options.dilationHFactor) > 1:
        return "it is dilated"
    return None


def _check_fully_connected(model, graph, operator):
    if operator.builtinOptions.weightsFormat != schema.FullyConnectedOptionsWeightsFormat.DEFAULT:
        return "its weights are not in the default format"
    shape = [int(size) for size in graph.tensors[operator.outputs[0]].shape]
    return f"its output has shape {shape}; one dimension is mapped" if int(np.prod(shape[:-1])) > 1 else None


def _check_reduction(model, graph, operator):
    axes = _read_constant(model, graph, operator, 1)
    rank = len(graph.tensors[operator.inputs[0]].shape)
    if axes is None:
        return "its axes are not constant"
    axes = sorted(int(axis) % rank for axis in axes)
    return None if set(axes) <= {1, 2} else f"it reduces the axes {axes}; height and width are mapped"


def _check_padding(model, graph, operator):
    amounts = _read_constant(model, graph, operator, 1)
    if amounts is None:
        return "its amounts are not constant"
    amounts = amounts.reshape(-1, 2)
    if len(amounts) == 4 and np.any(amounts[[0, 3]]):
        return "it pads batch or channels; height and width are mapped"
    return None


def _check_softmax(model, graph, operator):
    shape = [int(size) for size in graph.tensors[operator.inputs[0]].shape]
    if int(np.prod(shape[:-1])) > 1 or shape[-1] > 16_000:
        return f"its input has shape {shape}; one dimension of at most 16,000 is mapped"
    return None


def _check_strided_slice(model, graph, operator):
    strides = _read_constant(model, graph, operator, 3)
    if strides is None or np.any(strides != 1):
        return "its strides are not all 1"
    options = operator.builtinOptions
    return "it has an ellipsis or a new axis" if options.ellipsisMask or options.newAxisMask else None


def _accept(model, graph, operator):
    return None


_UNLIMITED = (
    *(_CODE.ADD, _CODE.AVERAGE_POOL_2D, _CODE.CONCATENATION, _CODE.EXPAND_DIMS, _CODE.L2_NORMALIZATION, _CODE.LOGISTIC),
    *(_CODE.MAXIMUM, _CODE.MAX_POOL_2D, _CODE.MINIMUM, _CODE.MUL, _CODE.PACK, _CODE.PRELU, _CODE.QUANTIZE, _CODE.RELU),
    *(_CODE.RELU6, _CODE.RELU_N1_TO_1, _CODE.RESHAPE, _CODE.RESIZE_BILINEAR, _CODE.RESIZE_NEAREST_NEIGHBOR),
    *(_CODE.RSQRT, _CODE.SLICE, _CODE.SPACE_TO_DEPTH, _CODE.SPLIT, _CODE.SQUARED_DIFFERENCE, _CODE.SQUEEZE, _CODE.SUB),
    *(_CODE.TANH, _CODE.TRANSPOSE, _CODE.TRANSPOSE_CONV),
)
_RULES: dict[int, Callable] = dict.fromkeys(_UNLIMITED, _accept) | {
    _CODE.CONV_2D: _check_convolution,
    _CODE.DEPTHWISE_CONV_2D: _check_depthwise,
    _CODE.FULLY_CONNECTED: _check_fully_connected,
    _CODE.MEAN: _check_reduction,
    _CODE.SUM: _check_reduction,
    _CODE.REDUCE_MAX: _check_reduction,
    _CODE.REDUCE_MIN: _check_reduction,
    _CODE.PAD: _check_padding,
    _CODE.SOFTMAX: _check_softmax,
    _CODE.STRIDED_SLICE: _check_strided_slice,
}


def _parameter_bytes(model, graph):
    buffers = {tensor.buffer for tensor in graph.tensors}
    return sum(len(model.buffers[index].data) for index in buffers if model.buffers[index].data is not None)


def _run_compiler(file):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.tflite"
        source.write_bytes(file)
        command = [COMPILER, "--out_dir", folder, "--show_operations", str(source)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        compiled = Path(folder) / "model_edgetpu.tflite"
        if outcome.returncode or not compiled.exists():
            lines = (outcome.stdout + outcome.stderr).strip().splitlines()
            raise ValueError(f"{COMPILER} refused the file: {lines[-1] if lines else 'it printed nothing'}")
        return compiled.read_bytes(), outcome.stdout


def parse_log(log: str) -> dict[str, Any]:
    """Reads the output of the compiler with --show_operations: version, counts, memory, and status of operators."""
    version = re.search(r"Edge TPU Compiler version (\S+)", log)
    record: dict[str, Any] = {"version": version[1] if version else None}
    for key, label in {
        "edge_tpu_operators": "Number of operations that will run on Edge TPU",
        "cpu_operators": "Number of operations that will run on CPU",
        "edge_tpu_subgraphs": "Number of Edge TPU subgraphs",
    }.items():
        match = re.search(rf"{label}: (\d+)", log)
        record[key] = int(match[1]) if match else None
    for key, label in {
        "cached_bytes": "On-chip memory used for caching model parameters",
        "streamed_bytes": "Off-chip memory used for streaming uncached model parameters",
    }.items():
        match = re.search(rf"{label}: ([\d.]+)(B|KiB|MiB)", log)
        record[key] = round(float(match[1]) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[match[2]]) if match else None
    rows = re.findall(r"^([A-Z][A-Z0-9_]+)\s+(\d+)\s+(\S.*)$", log, re.MULTILINE)
    record["operators"] = [{"operator": name, "count": int(count), "status": status} for name, count, status in rows]
    return record
