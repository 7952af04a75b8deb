"""LiteRT with weights of 4 bits stored as such: half the bytes of int8."""

import functools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.interpreter import predict
from tf_repvgg.tflite.targets.base import Built, integer_weights

_LOWEST, _LARGEST = -8, 7


def build(file: bytes) -> Built:
    """Stores every weight tensor whose codes fit into 4 bits as INT4, codes and scales unchanged; others stay int8.

    Outputs are those of the int8 file on the same kernels. LiteRT's default delegate has none for INT4, so convolutions
    run on its plain kernels, slower and rounding differently by a step or two of the output.

    Raises:
      ValueError: if no tensor fits.
    """
    model = flatbuffer.unpack(file)
    weights = integer_weights(model)
    fitting = [w for w in weights if w.codes.min() >= _LOWEST and w.codes.max() <= _LARGEST]
    if not fitting:
        largest = max(int(np.max(np.abs(w.codes.astype(np.int32)))) for w in weights)
        raise ValueError(
            f"no weights fit into 4 bits, codes {_LOWEST} to {_LARGEST}: the largest here is {largest}; export with "
            "--weight_bits=4, or train with LSQ at 4 bits"
        )
    for each in fitting:
        codes = flatbuffer.constant(model, each.tensor, np.int8)
        flatbuffer.set_constant(model, each.tensor, flatbuffer.pack_int4(codes), each.tensor.quantization.scale)
        each.tensor.type = schema.TensorType.INT4
    flatbuffer.drop_unused_buffers(model)
    packed = flatbuffer.pack(model)
    facts = {
        "int4_weight_bytes": sum((w.codes.size + 1) // 2 for w in fitting),
        "int8_weight_bytes": sum(w.codes.size for w in weights if w not in fitting),
        "left_in_int8": [w.name for w in weights if w not in fitting],
        "file_bytes": len(packed),
    }
    plain = functools.partial(predict, default_delegate=False)
    return Built(
        {"_int4.tflite": packed}, facts, functools.partial(plain, packed), functools.partial(plain, file), packed
    )
