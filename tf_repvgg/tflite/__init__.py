"""Fully integer TFLite files: writing them code for code, reading and running them."""

from tf_repvgg.tflite.convert import INFERENCE_TYPES, activation_bits, checked_inference_type, convert, with_weights
from tf_repvgg.tflite.interpreter import Latency, latency, predict
from tf_repvgg.tflite.reader import Operator, operators, weight_codes

__all__ = [
    "INFERENCE_TYPES",
    "Latency",
    "Operator",
    "activation_bits",
    "checked_inference_type",
    "convert",
    "latency",
    "operators",
    "predict",
    "weight_codes",
    "with_weights",
]
