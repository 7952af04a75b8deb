"""Number formats for weights and activations, and the methods that put a network on them.

A quantized model, whatever made it, is a Keras model of `QuantizedLayer`s and `ActivationQuantizer`s, which
`tf_repvgg.tflite.convert` writes code for code.
"""

from tf_repvgg.quantization.activations import ActivationQuantizer, quantize_activations, quantizers
from tf_repvgg.quantization.clustering import cluster_quantize, strip_cluster_quantize
from tf_repvgg.quantization.layers import (
    QuantizedConv2D,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
    QuantizedLayer,
    quantized_form,
)
from tf_repvgg.quantization.learned_step import learned_step_quantize, strip_learned_step
from tf_repvgg.quantization.uniform import QuantizedKernel, quantize_min_max

__all__ = [
    "ActivationQuantizer",
    "QuantizedConv2D",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "QuantizedKernel",
    "QuantizedLayer",
    "cluster_quantize",
    "learned_step_quantize",
    "quantize_activations",
    "quantize_min_max",
    "quantized_form",
    "quantizers",
    "strip_cluster_quantize",
    "strip_learned_step",
]
