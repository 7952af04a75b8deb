"""QARepVGG's block in training form (arXiv:2212.01593)."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.batch_norm import output_variance, scale_and_shift
from tf_repvgg.layers.kernels import identity_kernel, place_on_centre, scale_kernel
from tf_repvgg.layers.reparameterized_block import ReparameterizedBlock


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QARepVGGBlock(ReparameterizedBlock):
    """QARepVGG's training form (arXiv:2212.01593, S4): act(BN(BN(conv3x3(x)) + conv1x1(x) + x)).

    No normalization on the 1x1 and identity branches, and one after the sum. The identity branch exists where the
    block keeps the shape of its input.

    Args:
      filters: Number of output channels.
      **kwargs: Arguments of `ReparameterizedBlock`.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers import QARepVGGBlock
      >>> block = QARepVGGBlock(4)
      >>> block(keras.Input((8, 8, 4))).shape
      TensorShape([None, 8, 8, 4])
      >>> list(block.branches())
      ['conv3x3', 'conv1x1', 'identity']
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(filters, **kwargs)
        self.norm3x3 = self._make_batch_norm("norm3x3")
        self.norm_sum = self._make_batch_norm("norm_sum")

    def build(self, input_shape: Any) -> None:
        self.has_identity = self._keeps_shape(input_shape)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        outputs = self.norm3x3(self._convolve3x3(inputs), training=training) + self._convolve1x1(inputs)
        if self.has_identity:
            outputs += tf.cast(inputs, outputs.dtype)
        return self._activate(self.norm_sum(outputs, training=training))

    def branches(self) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        scale3x3, shift3x3 = scale_and_shift(self.norm3x3)
        scale, shift = scale_and_shift(self.norm_sum)
        no_bias = tf.zeros([self.filters])
        branches = {
            "conv3x3": (scale_kernel(self.conv3x3.kernel, scale3x3 * scale), shift3x3 * scale + shift),
            "conv1x1": (place_on_centre(scale_kernel(self.conv1x1.kernel, scale)), no_bias),
        }
        if self.has_identity:
            branches["identity"] = identity_kernel(self.filters, self.groups) * scale, no_bias
        return branches

    def pre_activation_statistics(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Both exact: beta of the normalization after the sum, and its gamma squared on running statistics."""
        return tf.convert_to_tensor(self.norm_sum.beta), output_variance(self.norm_sum)
