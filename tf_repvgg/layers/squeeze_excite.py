"""Squeeze-and-excite (arXiv:1709.01507): a factor for each channel, computed from the means of all channels."""

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras


class SqueezeExcite(keras.layers.Layer):
    """x * sigmoid(expand(relu(reduce(mean of x over all pixels)))), with 1x1 convolutions that have biases.

    It is the same in training and in deploy form.

    Args:
      filters: Number of channels.
      reduction: Quotient of the number of channels before and after the squeeze, which has filters // reduction.
      name: Name of the layer, and prefix of the names of its layers: name_pool, name_reduce, name_expand, name_scale.
      **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
      ValueError: If `reduction` is not a whole number from 1 to `filters`.
    """

    def __init__(self, filters: int, reduction: int, name: str, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if not (isinstance(reduction, int | np.integer) and 0 < reduction <= filters):
            raise ValueError(
                f"{type(self).__name__}: reduction is {reduction!r}; it must be a whole number from 1 to the number of "
                f"channels, {filters}"
            )
        policy = self.dtype_policy
        self.pool = keras.layers.GlobalAveragePooling2D(keepdims=True, dtype=policy, name=f"{name}_pool")
        self.reduce = keras.layers.Conv2D(
            filters // reduction, 1, activation="relu", dtype=policy, name=f"{name}_reduce"
        )
        self.expand = keras.layers.Conv2D(filters, 1, activation="sigmoid", dtype=policy, name=f"{name}_expand")
        self.scale = keras.layers.Multiply(dtype=policy, name=f"{name}_scale")

    def copy_weights(self, source: "SqueezeExcite") -> None:
        """Takes over the weights of a layer of the same shape."""
        for source_conv, conv in ((source.reduce, self.reduce), (source.expand, self.expand)):
            conv.build((None, 1, 1, source_conv.kernel.shape[2]))
            conv.set_weights(source_conv.get_weights())

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.scale([inputs, self.expand(self.reduce(self.pool(inputs)))])
