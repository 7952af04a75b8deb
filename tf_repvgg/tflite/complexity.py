"""Multiply-accumulates and weights of a TFLite file, which any tool may have written."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.reader import entropy_bits

_Code = schema.BuiltinOperator
# {operator whose MACs are counted: its inputs that may be weights}
_WEIGHTS_INPUTS = {
    **dict.fromkeys(flatbuffer.WEIGHTS_LAYOUT, (flatbuffer.WEIGHTS_INPUT,)),
    _Code.CONV_3D: (1,),
    _Code.BATCH_MATMUL: (0, 1),
    _Code.UNIDIRECTIONAL_SEQUENCE_RNN: (1, 2),
    _Code.UNIDIRECTIONAL_SEQUENCE_LSTM: (*range(1, 9), 16),
}
_TABLES = {_Code.GATHER: (0,), _Code.EMBEDDING_LOOKUP: (1,)}
_NOT_COUNTED = {
    _Code.LSTM,
    _Code.RNN,
    _Code.SVDF,
    _Code.BIDIRECTIONAL_SEQUENCE_LSTM,
    _Code.BIDIRECTIONAL_SEQUENCE_RNN,
    _Code.CONV_3D_TRANSPOSE,
    _Code.STABLEHLO_CONVOLUTION,
    _Code.STABLEHLO_DOT_GENERAL,
}
# How often they run their subgraphs depends on values.
_CONTROL_FLOW = {_Code.CALL, _Code.IF, _Code.WHILE, _Code.STABLEHLO_CASE, _Code.STABLEHLO_WHILE}
_UNPACKING = {_Code.DEQUANTIZE, _Code.DENSIFY}
_CODE_TYPES = {schema.TensorType.INT8: np.int8, schema.TensorType.UINT8: np.uint8}


class Costs(NamedTuple):
    """Costs of running and storing a file.

    Attributes:
      macs: Multiply-accumulates of convolutions, dense layers, matrix products and recurrent layers in one inference of
        the whole batch; None if loops, branches or rare operators make them unknown.
      weight_bytes: Bytes of their weights, as stored.
      weight_entropy_bits: Entropy of the codes of a weight tensor in bits per weight, mean over all weights; None if
        weights are float or sparse.

    Example:
      >>> from tf_repvgg.tflite import Costs
      >>> Costs(macs=8_000_000, weight_bytes=4096, weight_entropy_bits=2.5).weight_bytes
      4096
    """

    macs: int | None
    weight_bytes: int
    weight_entropy_bits: float | None


def costs(file: bytes) -> Costs:
    """Counts the MACs of a file's main graph and the weights of all graphs.

    Raises:
      ValueError: If the file is not a TFLite file.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> costs = tflite.costs(tflite.convert(model, calibration=np.ones([1, 8, 8, 3])))
      >>> costs.macs == 6 * 6 * 4 * 3 * 3 * 3, costs.weight_bytes
      (True, 108)
    """
    flat = flatbuffer.unpack(file)
    tensors = {
        tensor.buffer: tensor for graph in flat.subgraphs for tensor in _find_weights(flat, graph, _WEIGHTS_INPUTS)
    }
    weight_bytes = sum(len(flat.buffers[buffer].data) for buffer in tensors)
    return Costs(_count_macs(flat), weight_bytes, _mean_entropy_bits(flat, tensors))


def find_wide_weights(file: bytes | schema.ModelT, weight_bits: int) -> list[str]:
    """Names of the integer weights and lookup tables of a file that have more codes than a width allows.

    Weights that are named after a layer may have any codes, as those of a codebook, but not too many.

    Args:
      file: TFLite file, or what `flatbuffer.unpack` makes of one.
      weight_bits: Bits of a weight.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> file = tflite.convert(model, np.ones([1, 8, 8, 3]), weight_bits=4)
      >>> tflite.find_wide_weights(file, 4), tflite.find_wide_weights(file, 3)
      ([], ['conv/kernel'])
    """
    flat = flatbuffer.unpack(file) if isinstance(file, bytes) else file
    tensors = [tensor for graph in flat.subgraphs for tensor in _find_weights(flat, graph, _WEIGHTS_INPUTS | _TABLES)]
    return list(dict.fromkeys(flatbuffer.tensor_name(part) for part in tensors if _is_wide(flat, part, weight_bits)))


def _is_wide(flat: schema.ModelT, tensor: schema.TensorT, weight_bits: int) -> bool:
    codes = _read_codes(flat, tensor)
    if codes is None:
        return False
    largest = np.max(np.abs(codes.astype(np.int16)), initial=0)
    is_beside_grid = flatbuffer.weights_layer_name(tensor) is None and largest >= 2 ** (weight_bits - 1)
    return weight_bits < 8 and bool(is_beside_grid or len(np.unique(codes)) > 2**weight_bits)


def _count_macs(flat: schema.ModelT) -> int | None:
    codes = [{flatbuffer.operator_code(flat, operator) for operator in graph.operators} for graph in flat.subgraphs]
    multiplying = _NOT_COUNTED | _WEIGHTS_INPUTS.keys()
    if codes[0] & _NOT_COUNTED or (codes[0] & _CONTROL_FLOW and any(inner & multiplying for inner in codes[1:])):
        return None
    graph = flat.subgraphs[0]
    return sum(
        _count_operator(flatbuffer.operator_code(flat, operator), operator, graph) for operator in graph.operators
    )


def _count_operator(code: int, operator: schema.OperatorT, graph: schema.SubGraphT) -> int:
    if code not in _WEIGHTS_INPUTS:
        return 0
    inputs = [() if index < 0 else flatbuffer.tensor_shape(graph.tensors[index]) for index in operator.inputs]
    outputs = int(np.prod(flatbuffer.tensor_shape(graph.tensors[operator.outputs[0]])))
    if code == _Code.TRANSPOSE_CONV:  # the inputs are the sizes of the output, the weights, and the image
        return int(np.prod(inputs[2]) * np.prod(inputs[1][:3]))
    if code == _Code.CONV_3D:
        return outputs * int(np.prod(inputs[1][:4]))
    if code == _Code.BATCH_MATMUL:
        return outputs * inputs[0][-2 if operator.builtinOptions.adjX else -1]
    if layout := flatbuffer.WEIGHTS_LAYOUT.get(code):
        return outputs * (int(np.prod(inputs[1])) // inputs[1][layout.channel_axis])
    matrices = [inputs[index] for index in _WEIGHTS_INPUTS[code] if index < len(inputs)]
    return int(np.prod(inputs[0][:-1])) * sum(int(np.prod(shape)) for shape in matrices if shape)


def _find_weights(
    flat: schema.ModelT, graph: schema.SubGraphT, inputs: Mapping[int, tuple[int, ...]]
) -> list[schema.TensorT]:
    """The constants among certain inputs {operator code: positions} of operators.

    Float16 and sparse constants lie before an operator that unpacks them.
    """
    unpacked = {
        operator.outputs[0]: operator.inputs[0]
        for operator in graph.operators
        if flatbuffer.operator_code(flat, operator) in _UNPACKING
    }
    weights = []
    for operator in graph.operators:
        for position in inputs.get(flatbuffer.operator_code(flat, operator), ()):
            index = operator.inputs[position] if position < len(operator.inputs) else -1
            while index in unpacked:
                index = unpacked[index]
            if index >= 0 and flat.buffers[graph.tensors[index].buffer].data is not None:
                weights.append(graph.tensors[index])
    return weights


def _mean_entropy_bits(flat: schema.ModelT, tensors: Mapping[int, schema.TensorT]) -> float | None:
    codes = [_read_codes(flat, tensor) for tensor in tensors.values()]
    known = [tensor_codes for tensor_codes in codes if tensor_codes is not None]
    if not known or len(known) < len(codes):
        return None
    return sum(part.size * entropy_bits(part) for part in known) / sum(part.size for part in known)


def _read_codes(flat: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    if tensor.sparsity is not None:
        return None
    if tensor.type == schema.TensorType.INT4:
        packed = np.asarray(flat.buffers[tensor.buffer].data, np.uint8)
        return flatbuffer.unpack_int4(packed, int(np.prod(flatbuffer.tensor_shape(tensor))))
    dtype = _CODE_TYPES.get(tensor.type)
    return None if dtype is None else flatbuffer.constant(flat, tensor, dtype)
