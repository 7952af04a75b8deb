"""Outlier-aware batch normalization (arXiv:2402.07200, section 3), and what normalizations do on running statistics."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.clip_limit import ClipLimit

CLIP_MODES = ("project", "straight_through", "return_only")


@tf.custom_gradient
def _clip_straight_through(gamma, limit):
    """clip(gamma, -limit, limit); d/dgamma = 1 everywhere."""
    return tf.clip_by_value(gamma, -limit, limit), lambda upstream: (upstream, None)


@tf.custom_gradient
def _clip_return_only(gamma, limit):
    """clip(gamma, -limit, limit); d/dgamma = 1 inside, and outside only where descent moves gamma back inside."""

    def gradient(upstream):
        outside = tf.abs(gamma) > limit
        descent_returns = upstream * gamma > 0
        return tf.where(outside & ~descent_returns, tf.zeros_like(upstream), upstream), None

    return tf.clip_by_value(gamma, -limit, limit), gradient


class _ProjectGamma(keras.constraints.Constraint):
    """Stores the clipped gamma after each optimizer step; built by the layer, hence never serialized."""

    def __init__(self, layer, inner):
        self._layer = layer
        self._inner = inner

    def __call__(self, gamma):
        if self._inner is not None:
            gamma = self._inner(gamma)
        limit = self._layer.gamma_limit()
        return tf.clip_by_value(gamma, -limit, limit)


@keras.saving.register_keras_serializable(package="tf_repvgg")
class OutlierAwareBatchNormalization(keras.layers.BatchNormalization):
    r"""Batch normalization whose scale is clipped against the running variance.

    Forward, per channel (arXiv:2402.07200):

        gamma_hat = clip(gamma, -k * sqrt(variance_running + epsilon), +k * sqrt(variance_running + epsilon))
        y = gamma_hat * (x - mean) / sqrt(variance + epsilon) + beta

    so that the factor by which merging multiplies a branch's kernel, gamma_hat / sqrt(variance_running + epsilon),
    never exceeds k in magnitude: during training, at inference, after loading any weights, and in the fused kernel.

    Backward: `clip_mode` decides the gradient that the stored gamma receives from dL/dgamma_hat:

        project            the gradient unchanged; after each optimizer step the stored gamma is clipped too
        straight_through   the gradient unchanged; the stored gamma may drift beyond the limit
        return_only        unchanged inside the limit; outside, only gradients whose descent leads back inside

    Under a distribution strategy all replicas have the same limit: with `synchronized=True` the running variance is
    that of the global batch; otherwise it follows the mean of the replicas' variances.

    Args:
      k: Limit of |gamma_hat| / sqrt(variance_running + epsilon): a number above 0; infinity gives exactly
        BatchNormalization; "6std" means six standard deviations of the merged kernel without its identity branch,
        which only a block can provide (see `kernel_spread`).
      clip_mode: Gradient of the clip, one of `CLIP_MODES`.
      **kwargs: Arguments of `keras.layers.BatchNormalization`.

    Attributes:
      kernel_spread: Callable without arguments that returns a scalar tensor; the owning block sets it when k is
        relative. It is not serialized: the block sets it again.

    Raises:
      ValueError: If k is not above 0, `clip_mode` is unknown, or `scale=False` leaves no gamma to clip.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.layers import OutlierAwareBatchNormalization
      >>> norm = OutlierAwareBatchNormalization(k=0.25, epsilon=0.0)
      >>> norm.build((None, 2))
      >>> norm.gamma.assign([0.125, 1.0]).numpy().tolist()
      [0.125, 1.0]
      >>> norm(np.ones((1, 2), np.float32)).numpy().tolist()  # the running variance is 1
      [[0.125, 0.25]]
    """

    def __init__(self, k: float | str = 0.1, clip_mode: str = "project", **kwargs: Any) -> None:
        # Keras assigns attributes through __setattr__, which needs the layer to be initialized first.
        super().__init__(**kwargs)
        try:
            self._clip_limit = ClipLimit.parse(k)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        self.k = k
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"{type(self).__name__}: clip_mode is {clip_mode!r}; known: {', '.join(CLIP_MODES)}")
        if not self.scale:
            raise ValueError(f"{type(self).__name__}: scale=False leaves no gamma to clip; use BatchNormalization")
        self.clip_mode = clip_mode
        self.kernel_spread: Callable[[], tf.Tensor] | None = None

    @property
    def gamma(self) -> tf.Variable | tf.Tensor:
        """The stored gamma; while the parent's `call` runs, the clipped one.

        The parent reads `self.gamma` in several code paths (fused, synchronized, renormalized). Serving the clipped
        tensor there keeps all of them, without a copy of their code. Per thread, as replicas of a distribution
        strategy run the same layer in several; in Keras's own thread-local object, which copies of a layer renew.
        """
        clipped = getattr(self._thread_local, "clipped_gamma", None)
        return self._stored_gamma if clipped is None else clipped

    @gamma.setter
    def gamma(self, variable: tf.Variable) -> None:
        self._stored_gamma = variable

    def add_weight(self, name: str | None = None, constraint: Any = None, **kwargs: Any) -> tf.Variable:
        if name == "gamma" and self.clip_mode == "project" and self.clips:
            constraint = _ProjectGamma(self, constraint)
        if name == "moving_variance" and self.clips:
            # The limit on gamma must be the same on all replicas of a distribution strategy. Keras lets the running
            # variances of replicas differ until they are read; here each step averages them.
            aggregation = tf.VariableAggregation.NONE if self.synchronized else tf.VariableAggregation.MEAN
            kwargs |= {"synchronization": tf.VariableSynchronization.AUTO, "aggregation": aggregation}
        return super().add_weight(name=name, constraint=constraint, **kwargs)

    @property
    def clips(self) -> bool:
        """Whether k is finite; with k = infinity the layer is plain batch normalization."""
        return not math.isinf(self._clip_limit.value)

    def gamma_limit(self) -> tf.Tensor:
        """k * sqrt(variance_running + epsilon): shape [channels], not differentiable.

        Raises:
          ValueError: If k is relative to a kernel, and no block has set `kernel_spread`.
        """
        k = self._clip_limit.value
        if self._clip_limit.relative:
            if self.kernel_spread is None:
                raise ValueError(
                    f"{self.name}: k={self.k!r} is relative to a block's kernel, but this layer is in no block; "
                    "use a number"
                )
            k *= self.kernel_spread()
        return tf.stop_gradient(k * tf.sqrt(self.moving_variance + self.epsilon))

    def effective_gamma(self) -> tf.Tensor:
        """gamma_hat, the scale in force: shape [channels], differentiable as `clip_mode` says.

        Example:
          >>> from tf_repvgg.layers import OutlierAwareBatchNormalization
          >>> norm = OutlierAwareBatchNormalization(k=0.25, epsilon=0.0)
          >>> norm.build((None, 3))  # gamma and running variance start at 1
          >>> norm.gamma.numpy().tolist(), norm.effective_gamma().numpy().tolist()
          ([1.0, 1.0, 1.0], [0.25, 0.25, 0.25])
        """
        if not self.clips:
            return tf.convert_to_tensor(self._stored_gamma)
        clip = _clip_return_only if self.clip_mode == "return_only" else _clip_straight_through
        return clip(tf.convert_to_tensor(self._stored_gamma), self.gamma_limit())

    @contextlib.contextmanager
    def _serve_clipped_gamma(self):
        self._thread_local.clipped_gamma = self.effective_gamma()
        try:
            yield
        finally:
            self._thread_local.clipped_gamma = None

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        if not self.clips:
            return super().call(inputs, training=training, mask=mask)
        with self._serve_clipped_gamma():
            return super().call(inputs, training=training, mask=mask)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k, "clip_mode": self.clip_mode}


def scale_and_shift(norm: keras.layers.BatchNormalization) -> tuple[tf.Tensor, tf.Tensor]:
    """The scale t and the shift beta - mean * t of a batch normalization on running statistics: each [channels]."""
    if isinstance(norm, OutlierAwareBatchNormalization):
        gamma = norm.effective_gamma()
    else:
        gamma = norm.gamma if norm.scale else tf.ones_like(norm.moving_variance)
    scale = gamma / tf.sqrt(norm.moving_variance + norm.epsilon)
    return scale, (norm.beta if norm.center else 0.0) - norm.moving_mean * scale


def output_variance(norm: keras.layers.BatchNormalization) -> tf.Tensor:
    """Variance of a batch normalization's output on its running statistics: shape [channels]."""
    scale, _ = scale_and_shift(norm)
    return tf.square(scale) * norm.moving_variance
