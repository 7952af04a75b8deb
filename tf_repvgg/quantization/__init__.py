"""Number formats for weights and activations, and the methods that put a network on them.

A quantized model, whatever made it, is a Keras model of `QuantizedLayer`s and `ActivationQuantizer`s, which
`tf_repvgg.tflite.convert` writes code for code. Training with quantization is in `qat`, quantization after training in
`ptq`. Both are imported on first use: tfmot, which `qat` extends, takes more than a second to import.
"""

import importlib
from typing import TYPE_CHECKING

from tf_repvgg.quantization.activations import ActivationQuantizer, quantize_activations, quantizers
from tf_repvgg.quantization.quantized_layers import (
    QuantizedConv2D,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
    QuantizedLayer,
    quantized_form,
)
from tf_repvgg.quantization.uniform import GRANULARITIES, QuantizedKernel, quantize_min_max

if TYPE_CHECKING:
    from tf_repvgg.quantization import ptq, qat
    from tf_repvgg.quantization.qat import (
        cluster_quantize,
        learned_step_quantize,
        strip_cluster_quantize,
        strip_learned_step,
    )

__all__ = [
    "GRANULARITIES",
    "ActivationQuantizer",
    "QuantizedConv2D",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "QuantizedKernel",
    "QuantizedLayer",
    "cluster_quantize",
    "learned_step_quantize",
    "ptq",
    "qat",
    "quantize_activations",
    "quantize_min_max",
    "quantized_form",
    "quantizers",
    "strip_cluster_quantize",
    "strip_learned_step",
]

_LAZY_MODULES = ("ptq", "qat")


def __getattr__(name: str):
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.qat"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
