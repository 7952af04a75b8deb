"""Uniform quantization-aware training with a learned step size (LSQ, arXiv:1902.08153)."""

from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.checks import check_finite, values_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.quantized_layers import bias_of, fill_weights, kernel_of, linear, quantized_form
from tf_repvgg.quantization.uniform import LARGEST_CODE

_SMALLEST_STEP = 1e-8


def learned_step_quantize(
    model: keras.Model,
    weight_bits: int | str | Mapping[str, int] = 8,
    per_channel: bool = False,
    *,
    steps: Mapping[str, np.ndarray] | None = None,
    activation_bits: int | None = 8,
    range_momentum: float = 0.99,
    calibration: Iterable | None = None,
) -> keras.Model:
    """A copy of a fused model to be trained with weights on uniform grids whose steps are trained too.

    Args:
      model: functional deploy-form model of Conv2D, DepthwiseConv2D and Dense layers.
      weight_bits: 2 to 8, or {pattern of layer names: bits}, also as text: "stem=8,.*=4".
      per_channel: a step for every output channel, or one for the kernel.
      steps: {layer name: step to start with, of shape [1] or [channels]}, such as the scales of post-training
        quantization; by default, and for layers that are not in it, those of the paper.
      activation_bits, range_momentum, calibration: as for `tf_repvgg.quantization.cluster_quantize`.

    Returns:
      A model with the inputs and outputs of `model`, not compiled.

    Raises:
      ValueError: for a model that is not functional or not fused, bits outside 2..8, patterns that match no layer,
        layers of other kinds with weights, weights that are not finite, steps of no layer, of another shape, or not
        above 0, and bad calibration images.
    """
    wrapping.check_model(model)
    bits = values_by_layer(model, weight_bits, "weight bits", 2, 8)
    steps = steps or {}
    if unknown := steps.keys() - bits.keys():
        raise ValueError(f"steps are given for {sorted(unknown)[0]!r}; there are layers {', '.join(bits)}")
    return wrapping.wrap_layers(
        model,
        lambda layer, name: LearnedStep(layer, bits[name], per_channel, steps.get(name)),
        activation_bits,
        range_momentum,
        calibration,
    )


def strip_learned_step(model: keras.Model) -> keras.Model:
    """The model without what only training needs: the same function, ready for `tf_repvgg.tflite.convert`.

    Raises:
      ValueError: if no layer of the model is a `LearnedStep`.
    """
    return wrapping.strip_wrappers(model, LearnedStep)


def code_range(bits) -> tuple[int, int]:
    """Smallest and largest code: all that the bits hold, but for -128, which integer kernels do not take."""
    return max(-(2 ** (bits - 1)), -LARGEST_CODE), 2 ** (bits - 1) - 1


@keras.saving.register_keras_serializable(package="tf_repvgg")
class LearnedStep(keras.layers.Wrapper):
    """A layer whose kernel is codes times a step, both of which train.

    Forward: step * round(clip(w / step)). Backward, to the weights: straight through inside the range; to the step:
    equation 3 of the paper, scaled by 1 / sqrt(weights of the step * largest code) (section 2.2).

    Args:
      layer: Conv2D, DepthwiseConv2D or Dense.
      weight_bits: 2 to 8.
      per_channel: a step for each output channel, or one.
      first_step: what it starts at, [channels] or [1]; by default 2 * mean(|w|) / sqrt(largest code), as in the paper.

    Raises:
      ValueError: when it is built, for weights that are not finite, and a first step of another shape or not above 0.
    """

    stripped_by = "strip_learned_step"

    def __init__(self, layer, weight_bits=8, per_channel=False, first_step=None, **kwargs):
        kwargs.setdefault("name", f"learned_step_{layer.name}")
        kwargs.setdefault("dtype", "float32")
        super().__init__(layer, **kwargs)
        self.weight_bits = weight_bits
        self.per_channel = per_channel
        self._first_step = first_step  # not of the configuration: a saved layer has its step

    def build(self, input_shape):
        super().build(input_shape)
        check_finite(self.layer)
        start = self._start()
        self.step = self.add_weight("step", start.shape, tf.float32, keras.initializers.Constant(start))

    def _start(self):
        kernel = np.abs(kernel_of(self.layer))
        mean = kernel.mean(axis=tuple(range(kernel.ndim - 1))) if self.per_channel else kernel.mean().reshape(1)
        if self._first_step is not None:
            step = np.asarray(self._first_step, np.float32)
            if step.shape != mean.shape or not np.all((step > 0) & np.isfinite(step)):
                raise ValueError(
                    f"the first step of layer {self.layer.name!r} is {step}; it must be above 0, of shape {mean.shape}"
                )
            return step
        _, largest = code_range(self.weight_bits)
        # A channel of zeros needs some step.
        mean = np.where(mean > 0, mean, mean.max() if mean.max() > 0 else 1.0)
        return 2 * mean / np.sqrt(largest)

    def call(self, inputs):
        outputs = linear(self.layer, inputs, self.quantized_weights())
        if self.layer.use_bias:
            outputs = tf.nn.bias_add(outputs, self.layer.bias)
        return self.layer.activation(outputs)

    def quantized_weights(self):
        """The kernel as it is multiplied with, in the layout of `QuantizedKernel`; differentiable."""
        kernel = self.layer.depthwise_kernel if hasattr(self.layer, "depthwise_kernel") else self.layer.kernel
        if isinstance(self.layer, keras.layers.DepthwiseConv2D):
            kernel = tf.reshape(kernel, [*kernel.shape[:2], 1, kernel.shape[2] * kernel.shape[3]])
        return _quantized(tf.convert_to_tensor(kernel), tf.maximum(self.step, _SMALLEST_STEP), self.weight_bits)

    def strip(self):
        """The layer with its kernel on the grid, as a callable on tensors."""
        step = tf.maximum(self.step, _SMALLEST_STEP)
        form = quantized_form(self.layer, self.per_channel)
        return fill_weights(form, self.quantized_weights(), step, bias_of(self.layer))

    def get_config(self):
        return {**super().get_config(), "weight_bits": self.weight_bits, "per_channel": self.per_channel}


def _quantized(weights, step, bits):
    lowest, largest = code_range(bits)

    @tf.custom_gradient
    def function(weights, step):
        position = weights / step
        codes = tf.round(tf.clip_by_value(position, lowest, largest))

        def gradient(upstream):
            is_inside = (position > lowest) & (position < largest)
            to_step = upstream * tf.where(is_inside, codes - position, codes)
            axes = list(range(len(weights.shape) - 1)) if step.shape[0] > 1 else None
            to_step = tf.reshape(tf.reduce_sum(to_step, axes), step.shape)
            count = weights.shape.num_elements() / step.shape[0]
            return tf.where(is_inside, upstream, 0.0), to_step / np.sqrt(count * largest)

        return codes * step, gradient

    return function(weights, step)
