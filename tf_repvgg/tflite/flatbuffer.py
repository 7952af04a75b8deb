"""The flatbuffer of a TFLite file as Python objects, and the few edits that this package makes to it."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

# A buffer of this offset or below has its data, if any, in the flatbuffer itself.
_NO_OFFSET = 1
FILE_IDENTIFIER = b"TFL3"
DATA_ALIGNMENT = 16
_BIAS_TYPES = {schema.TensorType.INT32: np.int32, schema.TensorType.INT64: np.int64}
# The name of a weight tensor is that of its layer and this; Netron and other viewers show it.
_KERNEL_SUFFIX = "/kernel"


class WeightsLayout(NamedTuple):
    """Layout of an operator's weights.

    Attributes:
      channel_axis: Axis of the output channels, to which per-channel scales belong.
      first_axis: Position of the file's first axis in the layout of Keras, output channels last. A depthwise kernel
        has the layout of the equivalent grouped convolution: [height, width, 1, channels * depth multiplier].
      activations_input: Position of the activations among the operator's inputs.
      bias_input: Position of the bias, which the operator may not have.
      may_be_int4: Whether LiteRT has kernels for weights that are stored as INT4.
    """

    channel_axis: int
    first_axis: int
    activations_input: int = 0
    bias_input: int = 2
    may_be_int4: bool = True


WEIGHTS_INPUT = 1
WEIGHTS_LAYOUT = {
    schema.BuiltinOperator.CONV_2D: WeightsLayout(channel_axis=0, first_axis=-1),
    schema.BuiltinOperator.FULLY_CONNECTED: WeightsLayout(channel_axis=0, first_axis=-1),
    schema.BuiltinOperator.DEPTHWISE_CONV_2D: WeightsLayout(channel_axis=3, first_axis=2),
    # Its first input is the shape of the output.
    schema.BuiltinOperator.TRANSPOSE_CONV: WeightsLayout(
        channel_axis=0, first_axis=-1, activations_input=2, bias_input=3, may_be_int4=False
    ),
}


def unpack(file: bytes) -> schema.ModelT:
    """Parses a file. Constants behind the flatbuffer, where large files have them, become data of their buffers.

    Raises:
      ValueError: If the file is not a TFLite file, or a damaged one.
    """
    if file[4:8] != FILE_IDENTIFIER:
        raise ValueError(
            f"not a TFLite file: it should have {FILE_IDENTIFIER!r} at byte 4, but has {bytes(file[4:8])!r}"
        )
    try:
        model = schema.ModelT.InitFromPackedBuf(file, 0)
    except Exception as error:  # a damaged file makes the reader of the schema raise any error of Python
        raise ValueError(f"not a whole TFLite file ({type(error).__name__}: {error})") from None
    for buffer in model.buffers or ():
        if buffer.offset > _NO_OFFSET:
            end = buffer.offset + buffer.size
            if end > len(file):
                raise ValueError(f"not a whole TFLite file: a constant ends at byte {end:,} of {len(file):,}")
            buffer.data = np.frombuffer(file[buffer.offset : end], np.uint8)
            buffer.offset = buffer.size = 0
    return model


def order_inputs(model: schema.ModelT, names: Sequence[str]) -> None:
    """Puts the inputs of a file into an order: the converter's is that of their use, or any other.

    Args:
      model: File; stays as it is unless it has one signature with inputs of exactly these names.
      names: Names of the inputs in the order to have.
    """
    if len(model.signatureDefs or ()) != 1:
        return
    signature = model.signatureDefs[0]
    tensors = {entry.name.decode(): entry.tensorIndex for entry in signature.inputs}
    if sorted(tensors) == sorted(names):
        model.subgraphs[signature.subgraphIndex].inputs = np.array([tensors[name] for name in names], np.int32)


class _AlignedBuffer(schema.BufferT):
    """A buffer whose data start at a multiple of 16 bytes, as the format requires and Python's flatbuffers ignores.

    Kernels of microcontrollers read weights in place and may fail on others.
    """

    def Pack(self, builder):
        if self.data is None or not len(self.data):
            return super().Pack(builder)
        content = np.asarray(self.data, np.uint8).tobytes()
        builder.StartVector(1, len(content), DATA_ALIGNMENT)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def pack(model: schema.ModelT) -> bytes:
    """Serializes a model."""
    for buffer in model.buffers:
        buffer.__class__ = _AlignedBuffer
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())


def tensor_name(tensor: schema.TensorT) -> str:
    """The name of a tensor; empty if it has none."""
    return (tensor.name or b"").decode(errors="replace")


def tensor_shape(tensor: schema.TensorT) -> tuple[int, ...]:
    """The shape of a tensor; empty for a scalar."""
    return () if tensor.shape is None else tuple(int(size) for size in tensor.shape)


def operator_code(model: schema.ModelT, operator: schema.OperatorT) -> int:
    """The code of an operator in `schema.BuiltinOperator`."""
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)  # files of before 2020 have the second alone


def weights_layout(model: schema.ModelT, operator: schema.OperatorT) -> WeightsLayout | None:
    """The layout of an operator's weights; None if it has none."""
    return WEIGHTS_LAYOUT.get(operator_code(model, operator))


def weights_tensor(graph: schema.SubGraphT, operator: schema.OperatorT) -> schema.TensorT:
    """The weights among the inputs of an operator that has a `weights_layout`."""
    return graph.tensors[operator.inputs[WEIGHTS_INPUT]]


def activations_tensor(model: schema.ModelT, graph: schema.SubGraphT, operator: schema.OperatorT) -> schema.TensorT:
    """The activations among the inputs of an operator that has a `weights_layout`."""
    return graph.tensors[operator.inputs[WEIGHTS_LAYOUT[operator_code(model, operator)].activations_input]]


def weight_codes(model: schema.ModelT, tensor: schema.TensorT, layout: WeightsLayout) -> np.ndarray:
    """The codes of a weight tensor, int8, output channels last. The file may store them as INT4."""
    if tensor.type == schema.TensorType.INT4:
        packed = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        codes = unpack_int4(packed, int(np.prod(tensor.shape))).reshape(tensor.shape)
    else:
        codes = constant(model, tensor, np.int8)
    return np.moveaxis(codes, 0, layout.first_axis)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Packs two codes into each byte, in their order, the first into the low half.

    Of an odd number of codes, the last leaves the high half of its byte at zero.
    """
    nibbles = codes.reshape(-1).astype(np.uint8) & 0xF
    nibbles = np.pad(nibbles, [0, len(nibbles) % 2])
    return nibbles[::2] | nibbles[1::2] << 4


def unpack_int4(packed: np.ndarray, count: int) -> np.ndarray:
    """Unpacks the first `count` codes, int8."""
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)[:count]
    return (nibbles.astype(np.int8) ^ 8) - 8


def set_weights(
    model: schema.ModelT, tensor: schema.TensorT, layout: WeightsLayout, codes: np.ndarray, scale: np.ndarray
) -> None:
    """Gives a weight tensor new codes, output channels last, and scales."""
    set_constant(model, tensor, np.moveaxis(codes, layout.first_axis, 0), scale)
    tensor.quantization.quantizedDimension = layout.channel_axis


def set_weights_name(tensor: schema.TensorT, layer_name: str) -> None:
    """Names a weight tensor after its layer: "stage1_block1/kernel"."""
    tensor.name = f"{layer_name}{_KERNEL_SUFFIX}".encode()


def weights_layer_name(tensor: schema.TensorT) -> str | None:
    """The name of the layer after which a weight tensor is named; None if its name is of another form."""
    name = tensor_name(tensor)
    return name.removesuffix(_KERNEL_SUFFIX) if name.endswith(_KERNEL_SUFFIX) else None


def give_own_weights(graph: schema.SubGraphT, operators: Sequence[schema.OperatorT]) -> None:
    """Replaces the weight tensor that operators share with other operators by a copy."""
    graph.tensors.append(copy.deepcopy(weights_tensor(graph, operators[0])))
    for operator in operators:
        operator.inputs = np.array(operator.inputs)  # as read from a file it cannot be written to
        operator.inputs[WEIGHTS_INPUT] = len(graph.tensors) - 1


def bias_tensor(model: schema.ModelT, graph: schema.SubGraphT, operator: schema.OperatorT) -> schema.TensorT | None:
    """The bias among the inputs of an operator that has a `weights_layout`; None if it has no bias."""
    position = WEIGHTS_LAYOUT[operator_code(model, operator)].bias_input
    has_bias = len(operator.inputs) > position and operator.inputs[position] >= 0
    return graph.tensors[operator.inputs[position]] if has_bias else None


def bias_codes(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray:
    """The codes of a bias, int32 or int64."""
    return constant(model, tensor, _BIAS_TYPES[tensor.type])


def set_bias(
    model: schema.ModelT, graph: schema.SubGraphT, operator: schema.OperatorT, codes: np.ndarray, scale: np.ndarray
) -> None:
    """Gives the bias of an operator, if it has one, new codes and scales.

    With int16 activations it becomes int64, whatever the converter chose: kernels accumulate in the type of the bias,
    and 32 bits overflow.
    """
    if (tensor := bias_tensor(model, graph, operator)) is not None:
        if activations_tensor(model, graph, operator).type == schema.TensorType.INT16:
            tensor.type = schema.TensorType.INT64
        set_constant(model, tensor, codes.astype(_BIAS_TYPES[tensor.type]), scale)


def is_constant(model: schema.ModelT, tensor: schema.TensorT) -> bool:
    """Whether the file holds the values of a tensor; the weights of a product of two activations are not constant."""
    return model.buffers[tensor.buffer].data is not None


def constant(model: schema.ModelT, tensor: schema.TensorT, dtype: type) -> np.ndarray:
    """The values of a constant tensor, in its shape."""
    data = model.buffers[tensor.buffer].data
    return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype).reshape(tensor.shape)


def set_constant(model: schema.ModelT, tensor: schema.TensorT, values: np.ndarray, scale: np.ndarray) -> None:
    """Gives a tensor new values and scales, in a new buffer: the converter lets equal constants share one."""
    model.buffers.append(buffer := schema.BufferT())
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    tensor.buffer = len(model.buffers) - 1
    tensor.quantization.scale = np.asarray(scale, np.float32)
    tensor.quantization.zeroPoint = np.zeros(len(tensor.quantization.scale), np.int64)


def set_metadata(model: schema.ModelT, name: str, content: bytes) -> None:
    """Puts a named block of bytes, which interpreters ignore, into the file; replaces any block of that name."""
    model.buffers.append(buffer := schema.BufferT())
    buffer.data = np.frombuffer(content, np.uint8)
    entry = schema.MetadataT()
    entry.name = name
    entry.buffer = len(model.buffers) - 1
    others = [other for other in model.metadata or [] if other.name not in (name, name.encode())]
    model.metadata = [*others, entry]


def drop_unused_buffers(model: schema.ModelT) -> None:
    """Removes buffers that no tensor and no metadata refer to; buffer 0 stays, as the format requires."""
    owners = [tensor for graph in model.subgraphs for tensor in graph.tensors] + (model.metadata or [])
    kept = sorted({0} | {owner.buffer for owner in owners})
    position = {old: new for new, old in enumerate(kept)}
    model.buffers = [model.buffers[old] for old in kept]
    for owner in owners:
        owner.buffer = position[owner.buffer]
