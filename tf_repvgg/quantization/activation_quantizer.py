"""Fake quantization of activations, as integer TFLite files compute it."""

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.shared_graphs import share_graph
from tf_repvgg.quantization.uniform import largest_code

ACTIVATION_BITS = (8, 16)
# Steps from the smallest to the largest code: all 256 codes of 8 bits, symmetric codes of 16 bits.
_STEPS = {8: 255, 16: 2 * largest_code(16)}
# An activation that is always zero has a range narrower than the first width. It gets the second one, since runtimes
# refuse scales that small.
_DEAD_WIDTH, _NOMINAL_WIDTH = 1e-5, 255 / 128


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ActivationQuantizer(keras.layers.Layer):
    """Fake quantization of activations to 8 or 16 bits with one range per tensor.

    Forward: with [minimum, maximum] moved by less than half a step so that zero is a code,
    `scale * round(clip(x) / scale)`, rounding ties up. The range of 16 bits is symmetric around zero.

    Pseudo-gradient: 1 inside the range, 0 outside. In a graph that trains, it bypasses a ReLU directly before this
    layer and goes to the ReLU's input; the ReLU's output then has no gradient from this layer.

    In training, the range is a running average over batches; the first batch sets it. A step computes with the range
    that its own batch has updated:
    `range = momentum * range + (1 - momentum) * range of the batch`.
    Under a distribution strategy, that batch is the one of all replicas, which so have the same range.

    A range that was neither trained nor set is NaN, and so are all outputs.

    Args:
      momentum: Momentum of the running range, from 0 to 1.
      fixed_range: Range (minimum, maximum) that never changes, for activations whose range TFLite prescribes.
      nonnegative: Whether inputs are known to be zero or above, as after ReLU. Saves a pass over them.
      bits: Bits of a code, 8 or 16.
      **kwargs: Keyword arguments of a Keras layer. `dtype` is float32 by default, whatever the global policy is.

    Attributes:
      range: Range before it is moved to the grid, a float32 variable [minimum, maximum].
      is_frozen: Whether the running range is frozen, a bool variable.
      calibration_momentum: Momentum for the next batch while calibrating, when the range follows the batches outside of
        training too; otherwise None.

    Raises:
      ValueError: If the momentum is outside 0..1, `bits` is neither 8 nor 16, or the fixed range does not include zero.

    References: arXiv:1712.05877 (sections 3 and 3.1).

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization import ActivationQuantizer
      >>> quantizer = ActivationQuantizer(bits=8)
      >>> quantizer.build((None,))
      >>> quantizer.set_range(0.0, 255.0)
      >>> quantizer(np.array([-3.0, 0.4, 1.7, 300.0], np.float32)).numpy().tolist()
      [0.0, 0.0, 2.0, 255.0]
    """

    def __init__(
        self,
        momentum: float = 0.99,
        fixed_range: tuple[float, float] | None = None,
        nonnegative: bool = False,
        bits: int = 8,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if bits not in ACTIVATION_BITS:
            raise ValueError(f"activation bits are {bits!r}; known: {', '.join(map(str, ACTIVATION_BITS))}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum!r}; it must be from 0 to 1")
        if fixed_range is not None and not fixed_range[0] <= 0 <= fixed_range[1]:
            raise ValueError(f"fixed_range is {fixed_range!r}; it must include zero, which padding needs")
        self.momentum = momentum
        self.fixed_range = None if fixed_range is None else tuple(map(float, fixed_range))
        self.nonnegative = nonnegative
        self.bits = bits
        self.calibration_momentum: float | None = None

    def build(self, input_shape: Any) -> None:
        start = (np.nan, np.nan) if self.fixed_range is None else self.fixed_range
        initializer = keras.initializers.Constant(np.array(start, np.float32))
        self.range = self.add_weight("range", [2], tf.float32, initializer, trainable=False)
        self.is_frozen = self.add_weight("is_frozen", [], tf.bool, keras.initializers.Zeros(), trainable=False)
        super().build(input_shape)

    def freeze(self, frozen: bool = True) -> None:
        """Freezes the running range, or unfreezes it; takes effect at once, even in a compiled training step.

        Args:
          frozen: Whether the range is frozen from now on.
        """
        self.is_frozen.assign(frozen)

    def set_range(self, minimum: float, maximum: float) -> None:
        """Sets the range, extended to include zero.

        Args:
          minimum: Smallest value that is not clipped.
          maximum: Largest value that is not clipped.

        Raises:
          ValueError: If the range is not finite, if its minimum is above its maximum, or if the quantizer has a fixed
            range.
        """
        if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
            raise ValueError(f"{self.name}: [{minimum}, {maximum}] is not a range; were there NaN or no images?")
        if self.fixed_range is not None:
            raise ValueError(f"{self.name}: the range is fixed at {list(self.fixed_range)}")
        self.range.assign([min(minimum, 0.0), max(maximum, 0.0)])

    def scale(self) -> float:
        """The step of the grid; NaN while there is no range."""
        minimum, maximum = self.bounds()
        return float((maximum - minimum) / _STEPS[self.bits])

    def bounds(self) -> tuple[tf.Tensor, tf.Tensor]:
        """(minimum, maximum) of the grid. Both are codes, and so is zero.

        Computed here instead of by TensorFlow's operation: if zero falls between two codes, that operation and the
        converter choose different ones.
        """
        return _bounds(self.range, self.bits)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        values = tf.cast(inputs, tf.float32)
        is_updating = (training or self.calibration_momentum is not None) and self.fixed_range is None
        minimum, maximum = self._update_range(tf.stop_gradient(values)) if is_updating else self.bounds()
        outputs = tf.quantization.fake_quant_with_min_max_vars(
            values,
            tf.stop_gradient(minimum),
            tf.stop_gradient(maximum),
            num_bits=self.bits,
            narrow_range=self.bits == 16,
        )
        if training:
            outputs = _straight_through(outputs, values, minimum, maximum)
        return tf.cast(outputs, inputs.dtype)

    def _update_range(self, values):
        momentum = self.momentum if self.calibration_momentum is None else self.calibration_momentum
        shares = tf.constant([momentum, 1 - momentum], tf.float32)
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            measure = share_graph(_measure_unless_frozen, (), (2,), None)
            batch = _widen_over_replicas(replica, measure(self.is_frozen, self.range, values, self.nonnegative))
            # On two values instead of the activations: the range of the global batch is their minimum and maximum.
            values, nonnegative = batch, False
        else:
            nonnegative = self.nonnegative
        update = share_graph(_update, (), (2,), None, (2,))
        updated, bounds = update(self.is_frozen, self.range, values, shares, nonnegative, self.bits)
        self.range.assign(updated)
        return bounds

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "fixed_range": self.fixed_range,
            "nonnegative": self.nonnegative,
            "bits": self.bits,
        }


def round_to_codes(
    values: np.ndarray, low: np.ndarray | float, high: np.ndarray | float, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds values as an `ActivationQuantizer` does, in NumPy and for many ranges at once.

    Args:
      values: Values; broadcast against the ends of the ranges.
      low: Smallest value that is not clipped, zero or below.
      high: Largest value that is not clipped, zero or above.
      bits: Bits of a code, 8 or 16.

    Returns:
      The rounded values, and the step of each grid in the shape of `low` and `high`.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization.activation_quantizer import round_to_codes
      >>> rounded, scale = round_to_codes(np.array([-3.0, 0.4, 1.7, 300.0]), 0.0, 255.0, bits=8)
      >>> rounded.tolist(), float(scale)
      ([0.0, 0.0, 2.0, 255.0], 1.0)
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if bits == 16:
        high = np.maximum(-low, high)
        low = -high
    scale = np.maximum(high - low, _DEAD_WIDTH) / _STEPS[bits]
    smallest = np.round(low / scale)
    codes = np.clip(np.round(values / scale), smallest, smallest + _STEPS[bits])
    return codes * scale, scale


def _straight_through(outputs, values, minimum, maximum):
    """The outputs, with a gradient to the values that is 1 inside the range and 0 outside.

    TensorFlow's gradients of fake quantization and of a ReLU before it would each keep the values until the backward
    pass. This gradient covers both, and keeps one byte per value.
    """
    is_after_relu = not tf.executing_eagerly() and values.op.type == "Relu"
    is_inside = ((values > 0.0) if is_after_relu else (values >= minimum)) & (values <= maximum)

    @tf.custom_gradient
    def replace_gradient(_):
        return outputs, lambda upstream: tf.where(is_inside, upstream, 0.0)

    return replace_gradient(values.op.inputs[0] if is_after_relu else values)


def _measure(values, nonnegative):
    """[minimum, maximum] of a batch, extended to include zero."""
    minimum = 0.0 if nonnegative else tf.minimum(tf.reduce_min(values), 0.0)
    return tf.stack([minimum, tf.maximum(tf.reduce_max(values), 0.0)])


def _measure_unless_frozen(is_frozen, running, values, nonnegative):
    return tf.cond(is_frozen, lambda: running, lambda: _measure(values, nonnegative))


def _widen_over_replicas(replica, batch):
    """The smallest range that holds those of all replicas.

    Strategies reduce by sums and means only, so each replica adds its range to a row of its own.
    """
    count = replica.num_replicas_in_sync
    is_own = tf.range(count) == replica.replica_id_in_sync_group
    ranges = replica.all_reduce("SUM", tf.where(is_own[:, tf.newaxis], batch, tf.zeros([count, 2])))
    return tf.stack([tf.reduce_min(ranges[:, 0]), tf.reduce_max(ranges[:, 1])])


def _update(is_frozen, running, values, shares, nonnegative, bits):
    """Updates the running range by a batch; `shares` weigh the running range and that of the batch.

    Returns:
      The updated range, and its bounds on the grid.
    """

    def average():
        batch = _measure(values, nonnegative)
        return tf.where(tf.math.is_nan(running), batch, shares[0] * running + shares[1] * batch)

    updated = tf.cond(is_frozen, lambda: running, average)
    return updated, _bounds(updated, bits)


def _bounds(running, bits):
    minimum, maximum = tf.unstack(running)
    if bits == 16:
        largest = tf.maximum(-minimum, maximum)
        largest = tf.where(largest < _DEAD_WIDTH, _NOMINAL_WIDTH, largest)
        return -largest, largest
    width = tf.where(maximum - minimum < _DEAD_WIDTH, _NOMINAL_WIDTH, maximum - minimum)
    scale = width / _STEPS[8]
    zero_code = tf.round(-minimum / scale)
    return -zero_code * scale, (_STEPS[8] - zero_code) * scale
