"""Room for biases, which are integers of 32 bits at a scale that follows from those of inputs and weights."""

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import quantizer_before, quantizers
from tf_repvgg.quantization.quantized_layers import QuantizedLayer, bias_of
from tf_repvgg.quantization.uniform import QuantizedKernel, min_scale_of_bias, raise_scale


def make_room_for_biases(model: keras.Model) -> None:
    """Raises weight scales at which a bias would overflow: those of channels whose kernel is zero, or nearly so.

    Args:
      model: Model of `QuantizedLayer`s. Without `ActivationQuantizer`s it stays as it is.
    """
    if quantizers(model):
        for layer in graph.find_layers(model, QuantizedLayer):
            _make_room_for_bias(layer)


def _make_room_for_bias(layer):
    quantized = layer.get_quantized_kernel()
    input_scale = min(quantizer_before(node.keras_inputs[0]).scale() for node in layer.inbound_nodes)
    scale = raise_scale(quantized.scale, min_scale_of_bias(bias_of(layer), input_scale))
    if np.any(scale != quantized.scale):
        codes = np.where(scale == quantized.scale, quantized.codes, np.round(quantized.dequantize() / scale))
        layer.set_quantized_kernel(QuantizedKernel(codes.astype(np.int8), scale))
