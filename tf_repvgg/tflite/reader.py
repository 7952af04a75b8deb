"""What is in a TFLite file: operators, and weight codes."""

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
