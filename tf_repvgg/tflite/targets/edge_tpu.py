"""The Coral Edge TPU: what its compiler would map, by its published rules; and the compiler itself where there is one.

The rules are those of the page "TensorFlow models on the Edge TPU" (coral.ai/docs/edgetpu/models-intro): 8-bit tensors
of sizes known beforehand, of which only the three innermost dimensions may be larger than 1, the listed operators
within their limits, and a graph that is cut at the first operator that is not mapped: all after it runs on the CPU.
Operator versions are those that compiler 16.0 has been seen to accept or refuse.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.targets.base import Built

COMPILER = "edgetpu_compiler"
# On-chip memory that caches parameters; what does not fit is streamed over USB or PCIe in every inference.
CACHE_BYTES = 8 * 2**20
_INT8_TYPES = (schema.TensorType.INT8, schema.TensorType.UINT8)
_CODE = schema.BuiltinOperator
# Highest operator versions known to be accepted: google-coral/edgetpu issues 631 (CONV_2D 6 refused), 879 (QUANTIZE 3
# refused) and 845 (TRANSPOSE_CONV 4 refused).
_LAST_VERSION = {_CODE.CONV_2D: 5, _CODE.QUANTIZE: 2, _CODE.TRANSPOSE_CONV: 3}


def build(file: bytes) -> Built:
    """Reports, operator by operator, what is mapped and why not; runs `edgetpu_compiler` if it is on the PATH.

    Raises:
      ValueError: if the file is no TFLite file, or the compiler refuses it.
    """
    facts = check(file)
    if shutil.which(COMPILER) is None:
        facts["compiler"] = f"{COMPILER} is not on the PATH: checked by the published rules only"
        return Built({}, facts)
    compiled, log = _compiled(file)
    facts["compiler"] = parse_log(log)
    return Built({"_edgetpu.tflite": compiled}, facts)


def check(file: bytes) -> dict:
    """What the published rules say of a file: operators, reasons, and whether parameters fit the cache."""
    model = flatbuffer.unpack(file)
    reasons_of_file = _reasons_of_file(model)
    graph = model.subgraphs[0]
    operators, is_cut = [], bool(reasons_of_file)
    for operator in graph.operators:
        code = flatbuffer.operator_code(model, operator)
        reason = reasons_of_file[0] if reasons_of_file else _reason(model, graph, operator, code)
        if reason is None and is_cut:
            reason = "it comes after an operator that stays on the CPU"
        is_cut = is_cut or reason is not None
        operators.append({"operator": _name(code), "is_mapped": reason is None, "reason": reason})
    parameters = _parameter_bytes(model, graph)
    return {
        "operators": operators,
        "mapped_operators": sum(each["is_mapped"] for each in operators),
        "cpu_operators": sum(not each["is_mapped"] for each in operators),
        "parameter_bytes": parameters,
        "cache_bytes": CACHE_BYTES,
        "fits_cache": parameters <= CACHE_BYTES,
    }


def _name(code):
    return next((name for name, value in vars(_CODE).items() if value == code), str(code))


def _reasons_of_file(model):
    found = []
    if len(model.subgraphs) > 1:
        found.append(f"the file has {len(model.subgraphs)} subgraphs; one is mapped")
    graph = model.subgraphs[0]
    for what, indices in (("input", graph.inputs), ("output", graph.outputs)):
        for index in indices:
            tensor = graph.tensors[index]
            shape = [int(size) for size in tensor.shape]
            signature = shape if tensor.shapeSignature is None else [int(size) for size in tensor.shapeSignature]
            if -1 in signature or any(size <= 0 for size in shape):
                found.append(f"the {what} has no fixed size: {signature}")
            if shape and shape[0] != 1:
                found.append(f"the {what} is a batch of {shape[0]}; 1 is mapped")
    return found


def _reason(model, graph, operator, code):
    """Why an operator would stay on the CPU; None if it would not."""
    if code not in _RULES:
        return "the compiler does not know the operator"
    version = model.operatorCodes[operator.opcodeIndex].version
    if version > _LAST_VERSION.get(code, version):
        return f"its version is {version}; the compiler knows up to {_LAST_VERSION[code]}"
    tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
    for tensor in tensors:
        is_constant = model.buffers[tensor.buffer].data is not None
        if tensor.type not in _INT8_TYPES and not is_constant:
            return f"{tensor.name.decode()!r} is {_type_name(tensor.type)}; 8-bit integers are mapped"
        shape = [int(size) for size in tensor.shape]
        if not is_constant and any(size > 1 for size in shape[:-3]):
            return f"{tensor.name.decode()!r} has shape {shape}; only the three innermost sizes may be above 1"
    return _RULES[code](model, graph, operator)


def _type_name(number):
    return next(name for name, value in vars(schema.TensorType).items() if value == number).lower()


def _constant_of(model, graph, operator, position):
    tensor = graph.tensors[operator.inputs[position]]
    if model.buffers[tensor.buffer].data is None:
        return None
    return flatbuffer.constant(model, tensor, np.int32).reshape(-1)


def _convolution(model, graph, operator):
    options, filters = operator.builtinOptions, graph.tensors[operator.inputs[1]]
    channels = int(graph.tensors[operator.inputs[0]].shape[-1])
    if int(filters.shape[-1]) != channels:
        return f"it is grouped: its kernel takes {int(filters.shape[-1])} of {channels} channels"
    if options.dilationWFactor != options.dilationHFactor:
        return f"its dilations differ: {options.dilationHFactor} and {options.dilationWFactor}"
    return None


def _depthwise(model, graph, operator):
    options = operator.builtinOptions
    if max(options.dilationWFactor, options.dilationHFactor) > 1:
        return "it is dilated"
    return None


def _fully_connected(model, graph, operator):
    if operator.builtinOptions.weightsFormat != schema.FullyConnectedOptionsWeightsFormat.DEFAULT:
        return "its weights are not in the default format"
    shape = [int(size) for size in graph.tensors[operator.outputs[0]].shape]
    return f"its output has shape {shape}; one dimension is mapped" if int(np.prod(shape[:-1])) > 1 else None


def _reduction(model, graph, operator):
    axes = _constant_of(model, graph, operator, 1)
    rank = len(graph.tensors[operator.inputs[0]].shape)
    if axes is None:
        return "its axes are not constant"
    axes = sorted(int(axis) % rank for axis in axes)
    return None if set(axes) <= {1, 2} else f"it reduces the axes {axes}; height and width are mapped"


def _padding(model, graph, operator):
    amounts = _constant_of(model, graph, operator, 1)
    if amounts is None:
        return "its amounts are not constant"
    amounts = amounts.reshape(-1, 2)
    if len(amounts) == 4 and np.any(amounts[[0, 3]]):
        return "it pads batch or channels; height and width are mapped"
    return None


def _softmax(model, graph, operator):
    shape = [int(size) for size in graph.tensors[operator.inputs[0]].shape]
    if int(np.prod(shape[:-1])) > 1 or shape[-1] > 16_000:
        return f"its input has shape {shape}; one dimension of at most 16,000 is mapped"
    return None


def _strided_slice(model, graph, operator):
    strides = _constant_of(model, graph, operator, 3)
    if strides is None or np.any(strides != 1):
        return "its strides are not all 1"
    options = operator.builtinOptions
    return "it has an ellipsis or a new axis" if options.ellipsisMask or options.newAxisMask else None


def _anything(model, graph, operator):
    return None


_UNLIMITED = (
    *(_CODE.ADD, _CODE.AVERAGE_POOL_2D, _CODE.CONCATENATION, _CODE.EXPAND_DIMS, _CODE.L2_NORMALIZATION, _CODE.LOGISTIC),
    *(_CODE.MAXIMUM, _CODE.MAX_POOL_2D, _CODE.MINIMUM, _CODE.MUL, _CODE.PACK, _CODE.PRELU, _CODE.QUANTIZE, _CODE.RELU),
    *(_CODE.RELU6, _CODE.RELU_N1_TO_1, _CODE.RESHAPE, _CODE.RESIZE_BILINEAR, _CODE.RESIZE_NEAREST_NEIGHBOR),
    *(_CODE.RSQRT, _CODE.SLICE, _CODE.SPACE_TO_DEPTH, _CODE.SPLIT, _CODE.SQUARED_DIFFERENCE, _CODE.SQUEEZE, _CODE.SUB),
    *(_CODE.TANH, _CODE.TRANSPOSE, _CODE.TRANSPOSE_CONV),
)
_RULES: dict[int, Callable] = dict.fromkeys(_UNLIMITED, _anything) | {
    _CODE.CONV_2D: _convolution,
    _CODE.DEPTHWISE_CONV_2D: _depthwise,
    _CODE.FULLY_CONNECTED: _fully_connected,
    _CODE.MEAN: _reduction,
    _CODE.SUM: _reduction,
    _CODE.REDUCE_MAX: _reduction,
    _CODE.REDUCE_MIN: _reduction,
    _CODE.PAD: _padding,
    _CODE.SOFTMAX: _softmax,
    _CODE.STRIDED_SLICE: _strided_slice,
}


def _parameter_bytes(model, graph):
    buffers = {tensor.buffer for tensor in graph.tensors}
    return sum(len(model.buffers[index].data) for index in buffers if model.buffers[index].data is not None)


def _compiled(file):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.tflite"
        source.write_bytes(file)
        command = [COMPILER, "--out_dir", folder, "--show_operations", str(source)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        compiled = Path(folder) / "model_edgetpu.tflite"
        if outcome.returncode or not compiled.exists():
            lines = (outcome.stdout + outcome.stderr).strip().splitlines()
            raise ValueError(f"{COMPILER} refused the file: {lines[-1] if lines else 'it said nothing'}")
        return compiled.read_bytes(), outcome.stdout


def parse_log(log: str) -> dict:
    """What the compiler printed with --show_operations: version, counts, memory, and operators with their status."""
    facts = {"version": (re.search(r"Edge TPU Compiler version (\S+)", log) or [None, None])[1]}
    for key, words in {
        "edge_tpu_operators": r"Number of operations that will run on Edge TPU: (\d+)",
        "cpu_operators": r"Number of operations that will run on CPU: (\d+)",
        "edge_tpu_subgraphs": r"Number of Edge TPU subgraphs: (\d+)",
    }.items():
        found = re.search(words, log)
        facts[key] = int(found[1]) if found else None
    for key, words in {
        "cached_bytes": "On-chip memory used for caching model parameters",
        "streamed_bytes": "Off-chip memory used for streaming uncached model parameters",
    }.items():
        found = re.search(rf"{words}: ([\d.]+)(B|KiB|MiB)", log)
        facts[key] = round(float(found[1]) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[found[2]]) if found else None
    rows = re.findall(r"^([A-Z][A-Z0-9_]+)\s+(\d+)\s+(\S.*)$", log, re.MULTILINE)
    facts["operators"] = [{"operator": name, "count": int(count), "status": status} for name, count, status in rows]
    return facts
