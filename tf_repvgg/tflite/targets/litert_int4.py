"""LiteRT with weights stored in 4 bits: half the bytes of int8."""

import functools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.interpreter import predict
from tf_repvgg.tflite.targets.base import Built, Weights, integer_weights

_SMALLEST_CODE, _LARGEST_CODE = -8, 7


def build(file: bytes) -> Built:
    """Stores weight tensors whose codes fit into 4 bits as INT4, with the same codes and scales; others stay int8.

    Those of transposed convolutions, for which LiteRT has no such kernels, stay int8 too.

    On the same kernels, outputs equal those of the int8 file. LiteRT's default delegate has no kernels for INT4, so
    convolutions run on its plain kernels, slower and rounding differently by a step or two of the output.

    Raises:
      ValueError: If no tensor fits, or the file is not fully integer.
    """
    model = flatbuffer.unpack(file)
    all_weights = integer_weights(model)
    candidates = [weights for weights in all_weights if weights.layout.may_be_int4]
    if not candidates:
        raise ValueError("all weights are those of transposed convolutions, for which LiteRT has no kernels of 4 bits")
    fitting: list[Weights] = []
    remaining: list[Weights] = []
    for weights in all_weights:
        fits = weights.codes.min() >= _SMALLEST_CODE and weights.codes.max() <= _LARGEST_CODE
        (fitting if fits and weights.layout.may_be_int4 else remaining).append(weights)
    if not fitting:
        largest = max(int(np.max(np.abs(weights.codes.astype(np.int32)))) for weights in candidates)
        raise ValueError(
            f"no weights fit into 4 bits, codes {_SMALLEST_CODE} to {_LARGEST_CODE}: the largest here is {largest}; "
            "export with --weight_bits=4, or train with LSQ at 4 bits"
        )
    for weights in fitting:
        codes = flatbuffer.constant(model, weights.tensor, np.int8)
        flatbuffer.set_constant(model, weights.tensor, flatbuffer.pack_int4(codes), weights.tensor.quantization.scale)
        weights.tensor.type = schema.TensorType.INT4
    flatbuffer.drop_unused_buffers(model)
    packed = flatbuffer.pack(model)
    record = {
        "int4_weight_bytes": sum((weights.codes.size + 1) // 2 for weights in fitting),
        "int8_weight_bytes": sum(weights.codes.size for weights in remaining),
        "left_in_int8": [weights.name for weights in remaining],
        "file_bytes": len(packed),
    }
    predict_plain = functools.partial(predict, default_delegate=False)
    return Built(
        files={"_int4.tflite": packed},
        record=record,
        predict=functools.partial(predict_plain, packed),
        predict_int8=functools.partial(predict_plain, file),
        in_litert=packed,
    )
