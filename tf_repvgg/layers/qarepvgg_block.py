"""QARepVGG's block in training form (arXiv:2212.01593)."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.batch_norm import output_variance, scale_and_shift
from tf_repvgg.layers.kernels import place_on_centre, scale_kernel
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
        for suffix, conv in zip(self._suffixes, self.get_convolutions().values(), strict=True):
            if conv.kernel_size[0] == self.kernel_size:
                setattr(self, f"norm{suffix}", self._make_batch_norm(f"norm{suffix}"))
        self.norm_sum = self._make_batch_norm("norm_sum")

    def build(self, input_shape: Any) -> None:
        self.has_identity = self._keeps_shape(input_shape)
        super().build(input_shape)

    def _conv_norms(self):
        """The normalizations of the convolutions, in their order; None for a 1x1 convolution beside larger ones."""
        return [getattr(self, f"norm{suffix}", None) for suffix in self._suffixes]

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        parts = []
        for conv, norm in zip(self.get_convolutions().values(), self._conv_norms(), strict=True):
            part = self._convolve(conv, inputs)
            parts.append(part if norm is None else norm(part, training=training))
        outputs = sum(parts[1:], parts[0])
        if self.has_identity:
            outputs += tf.cast(inputs, outputs.dtype)
        return self._activate(self.norm_sum(outputs, training=training))

    def branches(self) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        scale, shift = scale_and_shift(self.norm_sum)
        branches: dict[str, tuple[tf.Tensor, tf.Tensor]] = {}
        for (name, conv), norm in zip(self.get_convolutions().items(), self._conv_norms(), strict=True):
            inner_scale, inner_shift = (1.0, tf.zeros([self.filters])) if norm is None else scale_and_shift(norm)
            kernel = scale_kernel(conv.kernel, inner_scale * scale)
            # The first branch also has the shift of the normalization after the sum.
            bias = inner_shift * scale + (0.0 if branches else shift)
            branches[name] = place_on_centre(kernel, self.kernel_size), bias
        if self.has_identity:
            branches["identity"] = self._identity_kernel() * scale, tf.zeros([self.filters])
        return branches

    def pre_activation_statistics(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Both exact: beta of the normalization after the sum, and its gamma squared on running statistics."""
        return tf.convert_to_tensor(self.norm_sum.beta), output_variance(self.norm_sum)
