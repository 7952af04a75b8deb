"""What is in a TFLite file: operators, weight codes, and what they cost."""

from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.quantization.uniform import QuantizedKernel
from tf_repvgg.tflite import flatbuffer

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


class Operator(NamedTuple):
    """One operator of the file: its name as in the schema, its version, and the shape of its first output."""

    name: str
    version: int
    output_shape: tuple[int, ...]


def operators(file: bytes) -> list[Operator]:
    """The operators of a file in execution order."""
    flat = flatbuffer.unpack(file)
    return [
        Operator(
            _NAMES[flatbuffer.operator_code(flat, operator)],
            flat.operatorCodes[operator.opcodeIndex].version,
            tuple(int(size) for size in graph.tensors[operator.outputs[0]].shape),
        )
        for graph in flat.subgraphs
        for operator in graph.operators
    ]


def weight_codes(file: bytes) -> list[QuantizedKernel]:
    """Codes (output channels last, see `QuantizedKernel`) and scales of every weight tensor, in execution order."""
    flat = flatbuffer.unpack(file)
    found = []
    for graph in flat.subgraphs:
        for operator in graph.operators:
            if (layout := flatbuffer.weights_layout(flat, operator)) is not None:
                weights = flatbuffer.weights_tensor(graph, operator)
                codes = flatbuffer.weight_codes(flat, weights, layout)
                found.append(QuantizedKernel(codes, np.asarray(weights.quantization.scale, np.float32)))
    return found


class Costs(NamedTuple):
    """What a file asks of a machine.

    Attributes:
      macs: multiply-accumulates of convolutions and dense layers, one inference.
      weight_bytes: of their weights, as stored.
      weight_entropy_bits: mean over all integer weights of the entropy of their tensor's codes, in bits per weight;
        None where weights are float.
    """

    macs: int
    weight_bytes: int
    weight_entropy_bits: float | None


def costs(file: bytes) -> Costs:
    """Counts over the main graph; see `Costs`.

    Raises:
      ValueError: if it is no TFLite file.
    """
    flat = flatbuffer.unpack(file)
    graph, macs, seen = flat.subgraphs[0], 0, {}
    for operator in graph.operators:
        if (layout := flatbuffer.weights_layout(flat, operator)) is None:
            continue
        weights = flatbuffer.weights_tensor(graph, operator)
        output = graph.tensors[operator.outputs[0]]
        channels = int(weights.shape[layout.channel_axis])
        macs += int(np.prod(output.shape)) * (int(np.prod(weights.shape)) // channels)
        seen[id(weights)] = weights, layout
    stored = sum(len(flat.buffers[weights.buffer].data) for weights, _ in seen.values())
    integer = (schema.TensorType.INT8, schema.TensorType.INT4)
    if not seen or any(weights.type not in integer for weights, _ in seen.values()):
        return Costs(macs, stored, None)
    codes = [flatbuffer.weight_codes(flat, *its) for its in seen.values()]
    bits = sum(its.size * entropy_bits(its) for its in codes)
    return Costs(macs, stored, bits / sum(its.size for its in codes))


def entropy_bits(codes: np.ndarray) -> float:
    """Entropy of the distribution of codes, in bits."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-np.sum(shares * np.log2(shares)))


def distinct_codes(codes: np.ndarray, is_per_channel: bool) -> int:
    """Distinct codes of a tensor, output channels last; per channel, of the channel with the most."""
    columns = codes.reshape(-1, codes.shape[-1]).T if is_per_channel else [codes]
    return max(len(np.unique(column)) for column in columns)


def metadata(file: bytes, name: str) -> bytes | None:
    """A named metadata block of a file; None if it has none of that name."""
    flat = flatbuffer.unpack(file)
    for entry in flat.metadata or []:
        if entry.name in (name, name.encode()):
            return np.asarray(flat.buffers[entry.buffer].data, np.uint8).tobytes()
    return None
