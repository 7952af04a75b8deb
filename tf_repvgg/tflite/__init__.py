"""Fully integer TFLite files: writing them code for code, reading and running them."""

from tf_repvgg.tflite.convert import (
    INFERENCE_TYPES,
    METADATA_NAME,
    activation_bits,
    checked_inference_type,
    convert,
    convert_float,
    with_weights,
)
from tf_repvgg.tflite.fidelity import LayerFidelity, layers
from tf_repvgg.tflite.interpreter import Latency, latency, predict
from tf_repvgg.tflite.reader import Costs, Operator, costs, metadata, operators, weight_codes

__all__ = [
    "INFERENCE_TYPES",
    "METADATA_NAME",
    "Costs",
    "Latency",
    "LayerFidelity",
    "Operator",
    "activation_bits",
    "checked_inference_type",
    "convert",
    "convert_float",
    "costs",
    "latency",
    "layers",
    "metadata",
    "operators",
    "predict",
    "weight_codes",
    "with_weights",
]
