"""Google's toolkit for post-training quantization, ai-edge-quantizer, on a float file: the peer of our methods."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg import native_output
from tf_repvgg.tflite import flatbuffer

INSTALL = "pip install 'tf_repvgg[comparison]', or ai-edge-quantizer==0.10.0"
# Our names of its algorithms for weights; activations always have 8 bits, by its moving average of the extremes.
ALGORITHMS = {"min_max": "MIN_MAX_UNIFORM_QUANT", "mse": "MSE", "octav": "OCTAV"}
BITS = (8, 4)


def quantize(float_file: bytes, algorithm: str, weight_bits: int, per_channel: bool, calibration: np.ndarray) -> bytes:
    """Writes a fully integer file: int8 activations, int8 or INT4 weights.

    Args:
      float_file: Float32 TFLite file of batch 1 (see `tf_repvgg.tflite.convert_float`).
      algorithm: Name in `ALGORITHMS`.
      weight_bits: Weight width: 8 or 4.
      per_channel: One weight scale per output channel, or one per tensor.
      calibration: Normalized float32 images [count, height, width, channels].

    Raises:
      ModuleNotFoundError: If the toolkit is not installed; says how to install it.
    """
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"ai-edge-quantizer is not installed: {INSTALL}") from None
    operations, granularities = qtyping.TFLOperationName, qtyping.QuantGranularity
    toolkit = quantizer.Quantizer(bytearray(float_file))
    # Everything in 8 bits first, since operations without weights know min-max and 8 bits only; then the weights.
    toolkit.add_static_config(".*", operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for operation in (operations.CONV_2D, operations.DEPTHWISE_CONV_2D, operations.FULLY_CONNECTED):
        if operation is operations.DEPTHWISE_CONV_2D and weight_bits < 8:
            continue
        toolkit.add_static_config(
            ".*",
            operation,
            activation_num_bits=8,
            weight_num_bits=weight_bits,
            weight_granularity=granularities.CHANNELWISE if per_channel else granularities.TENSORWISE,
            algorithm_key=quantizer.AlgorithmName[ALGORITHMS[algorithm]],
        )
    signature, argument = _find_input(float_file)
    samples = [{argument: image[np.newaxis]} for image in np.asarray(calibration, np.float32)]
    with native_output.hide():
        statistics = toolkit.calibrate({signature: samples})
        result = toolkit.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def store_as_int8(file: bytes) -> bytes:
    """Stores INT4 weights as int8, codes and scales unchanged, so that LiteRT runs them on the kernels of our files.

    On the slow kernels for INT4, outputs are the same except for rounding by a step.
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


def _find_input(file):
    """Key of the file's signature, and name of its only input."""
    from ai_edge_litert.interpreter import Interpreter

    ((signature, names),) = Interpreter(model_content=file).get_signature_list().items()
    (argument,) = names["inputs"]
    return signature, argument
