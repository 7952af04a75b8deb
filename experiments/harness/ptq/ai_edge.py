"""Google's toolkit for post-training quantization, ai-edge-quantizer, on a float file: what ours is compared with."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg import native_output
from tf_repvgg.tflite import flatbuffer

INSTALL = "pip install 'tf_repvgg[comparison]', or ai-edge-quantizer==0.10.0"
# Our names of its algorithms for weights; activations are always 8 bits, by its moving average of the extremes.
ALGORITHMS = {"min_max": "MIN_MAX_UNIFORM_QUANT", "mse": "MSE", "octav": "OCTAV"}
BITS = (8, 4)


def quantize(float_file: bytes, algorithm: str, weight_bits: int, per_channel: bool, calibration) -> bytes:
    """A fully integer file: int8 activations, int8 or INT4 weights.

    Args:
      float_file: float32 TFLite file of batch 1 (see `tf_repvgg.tflite.convert_float`).
      algorithm: a name in `ALGORITHMS`.
      weight_bits: 8 or 4.
      per_channel: one weight scale per output channel, or one per tensor.
      calibration: normalised float32 images [count, height, width, channels].

    Raises:
      ModuleNotFoundError: if the toolkit is not installed; says how to install it.
    """
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"ai-edge-quantizer is not installed: {INSTALL}") from None
    operations, kinds = qtyping.TFLOperationName, qtyping.QuantGranularity
    tool = quantizer.Quantizer(bytearray(float_file))
    # Everything in 8 bits first; what holds weights then as asked. Other operations know min-max only, and no 4 bits.
    tool.add_static_config(".*", operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for operation in (operations.CONV_2D, operations.DEPTHWISE_CONV_2D, operations.FULLY_CONNECTED):
        if operation is operations.DEPTHWISE_CONV_2D and weight_bits < 8:
            continue
        tool.add_static_config(
            ".*",
            operation,
            activation_num_bits=8,
            weight_num_bits=weight_bits,
            weight_granularity=kinds.CHANNELWISE if per_channel else kinds.TENSORWISE,
            algorithm_key=quantizer.AlgorithmName[ALGORITHMS[algorithm]],
        )
    signature, argument = _only_input(float_file)
    samples = [{argument: image[np.newaxis]} for image in np.asarray(calibration, np.float32)]
    with native_output.hide():
        statistics = tool.calibrate({signature: samples})
        result = tool.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def stored_as_int8(file: bytes) -> bytes:
    """The same codes and scales with INT4 weights stored as int8, so that LiteRT runs them on int8's kernels, as ours.

    On its own kernels for INT4, which are slow, outputs are the same but for roundings by a step.
    """
    model = flatbuffer.unpack(file)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type == schema.TensorType.INT4:
                packed = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
                codes = flatbuffer.unpack_int4(packed, int(np.prod(tensor.shape))).reshape(tensor.shape)
                flatbuffer.set_constant(model, tensor, codes, tensor.quantization.scale)
                tensor.type = schema.TensorType.INT8
    return flatbuffer.pack(model)


def _only_input(file):
    """(key of the signature, name of its one input)."""
    from ai_edge_litert.interpreter import Interpreter

    ((signature, its),) = Interpreter(model_content=file).get_signature_list().items()
    (argument,) = its["inputs"]
    return signature, argument
