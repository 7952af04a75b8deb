"""QARepVGG's block in training form (arXiv:2212.01593)."""

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.batch_norm import scale_and_shift
from tf_repvgg.layers.reparameterized_block import (
    ReparameterizedBlock,
    output_variance,
    place_on_centre,
    scale_kernel,
)


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QARepVGGBlock(ReparameterizedBlock):
    """QARepVGG's training form (arXiv:2212.01593, S4): act(BN(BN(conv3x3(x)) + conv1x1(x) + x)).

    No normalization on the 1x1 and identity branches, one after the sum. The identity branch exists where the block
    keeps its input's shape.
    """

    def __init__(self, filters, **kwargs):
        super().__init__(filters, **kwargs)
        self.norm3x3 = self._batch_norm("norm3x3")
        self.norm_sum = self._batch_norm("norm_sum")

    def build(self, input_shape):
        self.has_identity = self._keeps_shape(input_shape)
        super().build(input_shape)

    def call(self, inputs, training=None):
        outputs = self.norm3x3(self._conv3x3(inputs), training=training) + self._conv1x1(inputs)
        if self.has_identity:
            outputs += tf.cast(inputs, outputs.dtype)
        return self._activated(self.norm_sum(outputs, training=training))

    def branches(self):
        scale3x3, shift3x3 = scale_and_shift(self.norm3x3)
        scale, shift = scale_and_shift(self.norm_sum)
        found = {
            "conv3x3": (scale_kernel(self.conv3x3.kernel, scale3x3 * scale), shift3x3 * scale + shift),
            "conv1x1": (place_on_centre(scale_kernel(self.conv1x1.kernel, scale)), tf.zeros([self.filters])),
        }
        if self.has_identity:
            found["identity"] = self._identity_kernel() * scale, tf.zeros([self.filters])
        return found

    def pre_activation_statistics(self):
        """Both exact: beta of the normalization after the sum, and its gamma squared on running statistics."""
        return tf.convert_to_tensor(self.norm_sum.beta), output_variance(self.norm_sum)
