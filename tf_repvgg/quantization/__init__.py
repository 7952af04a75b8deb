"""Number formats for weights and the methods that put weights on them."""

from tf_repvgg.quantization.uniform import QuantizedKernel, quantize_min_max

__all__ = ["QuantizedKernel", "quantize_min_max"]
