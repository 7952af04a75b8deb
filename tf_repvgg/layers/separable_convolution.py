"""Separable convolutions as the two convolutions that they consist of."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tf_keras as keras


def split_separable_convolution(
    layer: keras.layers.SeparableConv2D,
    depthwise_name: str,
    pointwise_name: str,
    weights: Sequence[np.ndarray] | None = None,
    **changes: Any,
) -> Callable:
    """Makes the two layers that a separable convolution consists of, as a callable on tensors.

    Args:
      layer: Separable convolution with its weights.
      depthwise_name: Name of the DepthwiseConv2D layer.
      pointwise_name: Name of the Conv2D layer, which has bias and activation.
      weights: Depthwise kernel, pointwise kernel and, with `use_bias`, bias; by default those of the layer.
      **changes: Changes to the configuration of the Conv2D layer.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers.separable_convolution import split_separable_convolution
      >>> separable = keras.layers.SeparableConv2D(4, 3, name="conv")
      >>> inputs = keras.Input((8, 8, 3))
      >>> _ = separable(inputs)
      >>> outputs = split_separable_convolution(separable, "conv_depthwise", "conv")(inputs)
      >>> [(type(layer).__name__, layer.name) for layer in keras.Model(inputs, outputs).layers[1:]]
      [('DepthwiseConv2D', 'conv_depthwise'), ('Conv2D', 'conv')]
    """
    depthwise_kernel, *pointwise_weights = layer.get_weights() if weights is None else weights
    common = {
        "data_format": layer.data_format,
        "dtype": layer.variable_dtype,
        "trainable": layer.trainable,
    }
    depthwise = keras.layers.DepthwiseConv2D(
        layer.kernel_size,
        layer.strides,
        layer.padding,
        layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer,
        name=depthwise_name,
        **common,
    )
    pointwise_config = {
        "use_bias": layer.use_bias,
        "activation": layer.activation,
        "kernel_regularizer": layer.pointwise_regularizer,
        "bias_regularizer": layer.bias_regularizer,
        "name": pointwise_name,
    }
    pointwise = keras.layers.Conv2D(layer.filters, 1, **(common | pointwise_config | changes))

    def call(inputs: Any) -> Any:
        features = depthwise(inputs)
        outputs = pointwise(features)
        depthwise.set_weights([depthwise_kernel])
        pointwise.set_weights(pointwise_weights)
        return outputs

    return call
