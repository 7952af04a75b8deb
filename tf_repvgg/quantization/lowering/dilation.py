"""Transposed convolutions with a dilation rate, which integer files do not have, as convolutions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras as keras


def is_dilated(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a transposed convolution with a dilation rate, which Keras allows with strides of 1 only."""
    return isinstance(layer, keras.layers.Conv2DTranspose) and max(layer.dilation_rate) > 1


def as_convolution(layer: keras.layers.Layer, name: str, padding_name: str, **changes: Any) -> Callable:
    """Makes what computes a dilated transposed convolution: zeros around the image, and a convolution.

    The kernel is turned around, and its input channels come before its output channels.

    Args:
      layer: Layer for which `is_dilated` holds.
      name: Name of the convolution.
      padding_name: Name of the layer that pads.
      **changes: Changes to the layer's configuration.
    """
    config = layer.get_config() | {"dtype": layer.variable_dtype, "name": name} | changes
    del config["output_padding"]  # less than a stride, and so zero
    reach = [rate * (size - 1) for rate, size in zip(layer.dilation_rate, layer.kernel_size, strict=True)]
    # "same" leaves out those zeros that the convolution that is transposed pads with.
    zeros = [(pixels - pixels // 2, pixels // 2) if layer.padding == "same" else (pixels, pixels) for pixels in reach]
    padding = keras.layers.ZeroPadding2D(zeros, data_format=layer.data_format, name=padding_name)
    convolution = keras.layers.Conv2D.from_config(config | {"padding": "valid"})
    kernel, *bias = layer.get_weights()

    def call(inputs: Any) -> Any:
        outputs = convolution(padding(inputs))
        convolution.set_weights([np.swapaxes(kernel[::-1, ::-1], -1, -2), *bias])
        return outputs

    return call
