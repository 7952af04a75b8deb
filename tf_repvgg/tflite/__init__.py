"""Fully integer TFLite files: writing them code for code, reading them and running them."""

from tf_repvgg.tflite.complexity import Costs, costs, find_wide_weights
from tf_repvgg.tflite.convert import (
    INFERENCE_TYPES,
    CalibratedFile,
    activation_bits,
    calibrate,
    convert,
    convert_float,
    resolve_inference_type,
)
from tf_repvgg.tflite.fidelity import LayerFidelity, layers
from tf_repvgg.tflite.interpreter import predict
from tf_repvgg.tflite.reader import Operator, metadata, operators, weight_codes
from tf_repvgg.tflite.timing import Latency, latency
from tf_repvgg.tflite.verification import WrongFileError, make_samples, verify
from tf_repvgg.tflite.weights import METADATA_NAME, with_weights

__all__ = [
    "INFERENCE_TYPES",
    "METADATA_NAME",
    "CalibratedFile",
    "Costs",
    "Latency",
    "LayerFidelity",
    "Operator",
    "WrongFileError",
    "activation_bits",
    "calibrate",
    "convert",
    "convert_float",
    "costs",
    "find_wide_weights",
    "latency",
    "layers",
    "make_samples",
    "metadata",
    "operators",
    "predict",
    "resolve_inference_type",
    "verify",
    "weight_codes",
    "with_weights",
]
