"""RepVGG's block in training form (arXiv:2101.03697)."""

from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.batch_norm import OutlierAwareBatchNormalization, output_variance, scale_and_shift
from tf_repvgg.layers.clip_limit import ClipLimit
from tf_repvgg.layers.kernels import place_on_centre, scale_kernel
from tf_repvgg.layers.reparameterized_block import ReparameterizedBlock, check_choice

NORMS = ("bn", "oabn")
OABN_BRANCHES = ("identity", "all")
IDENTITIES = ("norm", "none", "constant")


@keras.saving.register_keras_serializable(package="tf_repvgg")
class RepVGGBlock(ReparameterizedBlock):
    """RepVGG's training form (arXiv:2101.03697, equation 1): act(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)).

    The identity branch exists where the block keeps the shape of its input.

    Args:
      filters: Number of output channels.
      norm: "bn", or "oabn" for `OutlierAwareBatchNormalization`.
      oabn_k: Limit k of OABN; may be relative to the block's own kernel, as in "6std".
      oabn_branches: Branches with OABN: "identity" for the identity branch only, or "all".
      clip_mode: Gradient of OABN's clip, see `OutlierAwareBatchNormalization`.
      identity: Identity branch: "norm" as published, or one of the controls "none" (no identity branch) and
        "constant" (identity_gain * x, nothing trained).
      identity_gain: Gain of identity="constant".
      **kwargs: Arguments of `ReparameterizedBlock`.

    Raises:
      ValueError: If a choice is unknown, norm="oabn" has no branch to clip, or a relative k has no kernel to refer to.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> block = RepVGGBlock(4, norm="oabn", oabn_k=0.125, epsilon=0.0)
      >>> block(keras.Input((8, 8, 4))).shape
      TensorShape([None, 8, 8, 4])
      >>> identity, _ = block.branches()["identity"]
      >>> np.diag(identity[1, 1]).tolist()  # the centre tap; gamma is 1 before training
      [0.125, 0.125, 0.125, 0.125]
    """

    def __init__(
        self,
        filters: int,
        norm: str = "bn",
        oabn_k: float | str = 0.1,
        oabn_branches: str = "identity",
        clip_mode: str = "project",
        identity: str = "norm",
        identity_gain: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, **kwargs)
        check_choice(self._kind, "norm", norm, NORMS)
        check_choice(self._kind, "oabn_branches", oabn_branches, OABN_BRANCHES)
        check_choice(self._kind, "identity", identity, IDENTITIES)
        if norm == "oabn" and oabn_branches == "identity" and identity != "norm":
            raise ValueError(
                f"{self._kind}: norm='oabn' clips the normalization of the identity branch, but identity={identity!r} "
                "has none; use norm='bn' or oabn_branches='all'"
            )
        if norm == "oabn" and oabn_branches == "all" and ClipLimit.parse(oabn_k).relative:
            raise ValueError(
                f"{self._kind}: oabn_k={oabn_k!r} is relative to the kernel that oabn_branches='all' itself clips; "
                "give oabn_k as a number, or use oabn_branches='identity'"
            )
        if norm == "oabn":
            OutlierAwareBatchNormalization(oabn_k, clip_mode)  # refuses bad arguments here rather than in `build`
        self.norm = norm
        self.oabn_k = oabn_k
        self.oabn_branches = oabn_branches
        self.clip_mode = clip_mode
        self.identity = identity
        self.identity_gain = identity_gain
        for suffix in self._suffixes:
            setattr(self, f"norm{suffix}", self._make_branch_norm(f"norm{suffix}"))
        self.norm_identity = None

    def _make_branch_norm(self, name):
        is_clipped = self.norm == "oabn" and (self.oabn_branches == "all" or name == "norm_identity")
        if not is_clipped:
            return self._make_batch_norm(name)
        norm = self._make_batch_norm(name, OutlierAwareBatchNormalization, k=self.oabn_k, clip_mode=self.clip_mode)
        norm.kernel_spread = self._conv_kernel_spread
        return norm

    def _conv_kernel_spread(self):
        """Standard deviation of the merged kernel without its identity branch: the scale of the other weights."""
        return tf.math.reduce_std(tf.add_n([kernel for kernel, _ in self._conv_branches().values()]))

    def build(self, input_shape: Any) -> None:
        if self.identity == "norm" and self._keeps_shape(input_shape):
            self.norm_identity = self._make_branch_norm("norm_identity")
        self.has_constant_identity = self.identity == "constant" and self._keeps_shape(input_shape)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        first, *others = (
            norm(self._convolve(conv, inputs), training=training)
            for conv, norm in zip(self.get_convolutions().values(), self._conv_norms(), strict=True)
        )
        outputs = sum(others, first)
        if self.norm_identity is not None:
            outputs += self.norm_identity(inputs, training=training)
        elif self.has_constant_identity:
            outputs += self.identity_gain * tf.cast(inputs, outputs.dtype)
        return self._activate(outputs)

    def _conv_norms(self):
        """The normalizations of the convolutions, in their order."""
        return [getattr(self, f"norm{suffix}") for suffix in self._suffixes]

    def _conv_branches(self):
        branches = {}
        for (name, conv), norm in zip(self.get_convolutions().items(), self._conv_norms(), strict=True):
            scale, shift = scale_and_shift(norm)
            branches[name] = place_on_centre(scale_kernel(conv.kernel, scale), self.kernel_size), shift
        return branches

    def branches(self) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        branches = self._conv_branches()
        if self.norm_identity is not None:
            scale, shift = scale_and_shift(self.norm_identity)
            branches["identity"] = self._identity_kernel() * scale, shift
        elif self.has_constant_identity:
            branches["identity"] = self._identity_kernel() * self.identity_gain, tf.zeros([self.filters])
        return branches

    def pre_activation_statistics(self) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Mean: the sum of the betas, exact. Variance: the sum over branches, as if they were uncorrelated.

        None for a constant identity, which has no normalization.
        """
        if self.has_constant_identity:
            return None
        norms = self._conv_norms() + ([] if self.norm_identity is None else [self.norm_identity])
        return tf.add_n([norm.beta for norm in norms]), tf.add_n([output_variance(norm) for norm in norms])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "norm": self.norm,
            "oabn_k": self.oabn_k,
            "oabn_branches": self.oabn_branches,
            "clip_mode": self.clip_mode,
            "identity": self.identity,
            "identity_gain": self.identity_gain,
        }
