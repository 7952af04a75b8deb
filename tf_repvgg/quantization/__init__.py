"""Number formats for weights and activations, and the methods that bring a network into them.

Every method ends in a Keras model of `QuantizedLayer`s and `ActivationQuantizer`s, which `tf_repvgg.tflite.convert`
writes code for code. `qat` holds quantization-aware training, `ptq` post-training quantization, and `fitting` the
choice of levels for a budget, which needs the files of `tf_repvgg.tflite`. All are imported on first use, since
tensorflow-model-optimization, which `qat` extends, takes more than a second to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tf_repvgg.quantization import lazy_layers
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import quantize_activations, quantizers
from tf_repvgg.quantization.quantized_layers import (
    QuantizedConv2D,
    QuantizedConv2DTranspose,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
    QuantizedLayer,
    make_quantized_layer,
)
from tf_repvgg.quantization.quantized_model import QuantizedModel
from tf_repvgg.quantization.uniform import GRANULARITIES, QuantizedKernel, quantize_min_max

if TYPE_CHECKING:
    from tf_repvgg.quantization import fitting, ptq, qat
    from tf_repvgg.quantization.fitting import fit
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
    "QuantizedConv2DTranspose",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "QuantizedKernel",
    "QuantizedLayer",
    "QuantizedModel",
    "cluster_quantize",
    "fit",
    "fitting",
    "learned_step_quantize",
    "make_quantized_layer",
    "ptq",
    "qat",
    "quantize_activations",
    "quantize_min_max",
    "quantizers",
    "strip_cluster_quantize",
    "strip_learned_step",
]

_LAZY_MODULES = ("fitting", "ptq", "qat")

lazy_layers.register()


def __getattr__(name: str) -> Any:
    """Imports `fitting`, `ptq` and `qat`, and functions of the first and the last, on first use."""
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        wing = "fitting" if name == "fit" else "qat"
        return getattr(importlib.import_module(f"{__name__}.{wing}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
