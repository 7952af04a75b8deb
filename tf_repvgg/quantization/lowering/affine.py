"""A factor and an offset for each channel: what normalizations, rescalings and constants in operators come to."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.quantized_layers import QuantizedDepthwiseConv2D
from tf_repvgg.quantization.uniform import LARGEST_CODE


class Affine(NamedTuple):
    """The function x * factor + offset, channel by channel.

    Attributes:
      factor: Factor of each channel, float64 [channels].
      offset: Offset of each channel, float64 [channels].
    """

    factor: np.ndarray
    offset: np.ndarray

    @classmethod
    def identity(cls, channels: int) -> "Affine":
        """The function that changes nothing."""
        return cls(np.ones(channels), np.zeros(channels))

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same factor and the same offset."""
        return bool(np.all(self.factor == self.factor[0]) and np.all(self.offset == self.offset[0]))

    def then(self, second: "Affine") -> "Affine":
        """The function that applies this one first, and then the second one."""
        return Affine(self.factor * second.factor, self.offset * second.factor + second.offset)

    def resize(self, channels: int) -> "Affine":
        """A uniform function for another number of channels."""
        return Affine(np.full(channels, self.factor[0]), np.full(channels, self.offset[0]))


class ChannelAffine(keras.layers.Layer):
    """Applies an `Affine`; stands in the graph only while a model is being lowered.

    Args:
      affine: Function to apply.
      name: Name of the layer.
    """

    def __init__(self, affine: Affine, name: str) -> None:
        super().__init__(name=name, trainable=False, dtype="float32")
        self.affine = affine

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs * self.affine.factor.astype(np.float32) + self.affine.offset.astype(np.float32)


def spread_constant(value: Any, shape: tf.TensorShape) -> np.ndarray | None:
    """A constant as one number per channel, if that is what it is.

    Args:
      value: Number, array or tensor that is combined with a tensor by broadcasting.
      shape: Shape of the other tensor, batch first.

    Returns:
      Float64 [channels]; None if the constant differs along another axis than the last one, or would widen the tensor.
    """
    array = np.asarray(value, np.float64)
    fits = array.ndim <= len(shape) and array.size in (1, shape[-1]) and array.shape[-1:] in ((), (1,), (array.size,))
    return np.broadcast_to(array.reshape(-1), [shape[-1]]) if fits and shape[-1] else None


def apply_as_convolution(inputs: Any, affine: Affine, name: str) -> Any:
    """Applies an `Affine` by a layer that integer files have: a depthwise 1x1 convolution, whose weights are on a grid.

    A channel's only weight is the largest code times the channel's scale, and so exact. That takes one operator and one
    rounding, where a product and a sum take two, with constants that share a scale across channels.

    Args:
      inputs: Keras tensor with the channels last, of any number of dimensions.
      affine: Function to apply.
      name: Name of the convolution.

    Returns:
      Keras tensor of the same shape.
    """
    shape = inputs.shape[1:]
    if len(shape) != 3:
        inputs = keras.layers.Reshape((-1, 1, shape[-1]), name=f"{name}_as_image")(inputs)
    layer = QuantizedDepthwiseConv2D(1, per_channel=True, trainable=False, dtype="float32", name=name)
    outputs = layer(inputs)
    magnitude = np.abs(affine.factor)
    scale = (np.where(magnitude > 0, magnitude, 1.0) / LARGEST_CODE).astype(np.float32)
    kernel = np.float32(LARGEST_CODE) * np.sign(affine.factor).astype(np.float32) * scale
    layer.set_weights([kernel.reshape(1, 1, -1, 1), affine.offset.astype(np.float32), scale])
    if len(shape) != 3:
        outputs = keras.layers.Reshape([-1 if size is None else size for size in shape], name=f"{name}_as_before")(
            outputs
        )
    return outputs
