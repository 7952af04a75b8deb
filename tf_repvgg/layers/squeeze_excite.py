"""Squeeze-and-excite (arXiv:1709.01507): each channel scaled by what all channels say together."""

import numbers

import tf_keras as keras


class SqueezeExcite(keras.layers.Layer):
    """x * sigmoid(expand(relu(reduce(mean of x over all pixels)))), with 1x1 convolutions that have biases.

    Nothing here depends on the form of a network, so it is the same in training and in deploy form.

    Args:
      filters: number of channels.
      reduction: the squeeze has filters // reduction channels.
      name: prefix of the names of its layers: name_pool, name_reduce, name_expand, name_scale.

    Raises:
      ValueError: if `reduction` is no whole number from 1 to `filters`.
    """

    def __init__(self, filters, reduction, name, **kwargs):
        super().__init__(name=name, **kwargs)
        if not (isinstance(reduction, numbers.Integral) and 0 < reduction <= filters):
            raise ValueError(
                f"{type(self).__name__}: reduction is {reduction!r}; it must be a whole number from 1 to the {filters} "
                "channels it divides"
            )
        policy = self.dtype_policy
        self.pool = keras.layers.GlobalAveragePooling2D(keepdims=True, dtype=policy, name=f"{name}_pool")
        self.reduce = keras.layers.Conv2D(
            filters // reduction, 1, activation="relu", dtype=policy, name=f"{name}_reduce"
        )
        self.expand = keras.layers.Conv2D(filters, 1, activation="sigmoid", dtype=policy, name=f"{name}_expand")
        self.scale = keras.layers.Multiply(dtype=policy, name=f"{name}_scale")

    def copy_weights(self, other: "SqueezeExcite"):
        """Takes over the weights of another one of the same shape."""
        for mine, its in ((self.reduce, other.reduce), (self.expand, other.expand)):
            mine.build((None, 1, 1, its.kernel.shape[2]))
            mine.set_weights(its.get_weights())

    def call(self, inputs):
        return self.scale([inputs, self.expand(self.reduce(self.pool(inputs)))])
