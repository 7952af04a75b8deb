"""Uniform quantization-aware training with a learned step size (LSQ, arXiv:1902.08153)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.checks import bits_by_layer, check_finite, per_channel_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.quantized_layers import (
    apply_kernel,
    arrange_kernel,
    bias_of,
    fill_on_call,
    kernel_name,
    kernel_of,
    make_quantized_layer,
)
from tf_repvgg.quantization.uniform import LARGEST_CODE, largest_code

_SMALLEST_STEP = 1e-8


def learned_step_quantize(
    model: keras.Model,
    weight_bits: int | str | Mapping[str, int] = 8,
    per_channel: bool | str | Mapping[str, bool] = False,
    *,
    steps: Mapping[str, np.ndarray] | None = None,
    activation_bits: int | None = 8,
    range_momentum: float = 0.99,
    calibration: Any = None,
) -> keras.Model:
    """Copies a fused model for training with weights on uniform grids whose step sizes are trained too.

    Args:
      model: Functional deploy-form model whose layers with weights are Conv2D, Conv2DTranspose, DepthwiseConv2D and
        Dense.
      weight_bits: Bits of a weight, from 2 to 8, or bits by pattern of layer names, first match wins; also as text:
        "stem=8,.*=4".
      per_channel: Whether every output channel has its own step size, otherwise the kernel has one; or that by pattern
        of layer names: "stem=per_channel,.*=per_tensor" as text or as {pattern: whether it has}.
      steps: Initial step sizes by layer name, each of shape [1] or [channels], such as the scales of post-training
        quantization. Layers that are not in it start with the step size of the paper.
      activation_bits: Bits of activations, 8 or 16, quantized with running ranges, input included; None leaves
        activations in float.
      range_momentum: Momentum of the running ranges, from 0 to 1.
      calibration: Images as for training the model that initialize the ranges, in any form that
        `tf_repvgg.quantization.samples.read_samples` takes. Without them the outputs of the model are NaN until its
        first training step.

    Returns:
      A model with the inputs and outputs of `model`, not compiled.

    Raises:
      ValueError: If the model is not functional or not fused, has other layers with weights, or weights that are not
        finite; if bits are outside 2..8, or a pattern matches no layer; if a step size is for a layer that does not
        exist, has another shape or is not above 0; and for bad calibration images.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import learned_step_quantize
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> trainable = learned_step_quantize(model, weight_bits=4)
      >>> [weight.name for weight in trainable.trainable_weights]
      ['learned_step_conv/step:0', 'conv/kernel:0', 'conv/bias:0']
    """
    model, inputs = wrapping.prepare_model(model, calibration)
    bits, granularity = bits_by_layer(model, weight_bits), per_channel_by_layer(model, per_channel)
    steps = steps or {}
    if unknown := steps.keys() - bits.keys():
        raise ValueError(f"steps: {sorted(unknown)[0]!r} is no layer with weights; there are {', '.join(bits)}")
    return wrapping.wrap_layers(
        model,
        lambda layer, name: LearnedStep(layer, bits[name], granularity[name], steps.get(name)),
        activation_bits,
        range_momentum,
        inputs,
    )


def strip_learned_step(model: keras.Model) -> keras.Model:
    """Copies a model of `learned_step_quantize` without the wrappers that only training needs; the function stays.

    Args:
      model: Trained model.

    Returns:
      A model of `QuantizedLayer`s and, if activations are quantized, `ActivationQuantizer`s, ready for
      `tf_repvgg.tflite.convert`.

    Raises:
      ValueError: If no layer of the model is a `LearnedStep`.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import learned_step_quantize, strip_learned_step
      >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
      >>> stripped = strip_learned_step(learned_step_quantize(model, weight_bits=4, activation_bits=None))
      >>> type(stripped.get_layer("dense")).__name__
      'QuantizedDense'
    """
    return wrapping.strip_wrappers(model, LearnedStep)


def code_range(bits: int) -> tuple[int, int]:
    """(smallest code, largest code): all that the bits hold, except -128, which integer kernels do not accept.

    Args:
      bits: Bits of a weight, from 2 to 8.
    """
    return max(-(2 ** (bits - 1)), -LARGEST_CODE), largest_code(bits)


@keras.saving.register_keras_serializable(package="tf_repvgg")
class LearnedStep(wrapping.TrainingWrapper):
    """A layer whose kernel is codes times a step size, both of which train.

    Forward: step * round(clip(w / step)).

    Pseudo-gradient: to the weights, straight through inside the range and 0 outside; to the step size, equation 3 of
    the paper, scaled by 1 / sqrt(weights per step * largest code) (section 2.2).

    Args:
      layer: Conv2D, Conv2DTranspose, DepthwiseConv2D or Dense layer.
      weight_bits: Bits of a weight, from 2 to 8.
      per_channel: Whether every output channel has its own step size; otherwise the kernel has one.
      first_step: Initial step size, [channels] or [1]; by default that of the paper,
        2 * mean(|w|) / sqrt(largest code).
      **kwargs: Keyword arguments of a Keras layer.

    Raises:
      ValueError: When it is built, if weights are not finite, or the initial step size has another shape or is not
        above 0.
    """

    stripped_by = "strip_learned_step"

    def __init__(
        self,
        layer: keras.layers.Layer,
        weight_bits: int = 8,
        per_channel: bool = False,
        first_step: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("name", f"learned_step_{layer.name}")
        kwargs.setdefault("dtype", "float32")
        super().__init__(layer, **kwargs)
        self.weight_bits = weight_bits
        self.per_channel = per_channel
        self._first_step = first_step  # not part of the configuration: a saved layer has its step size

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        check_finite(self.layer)
        step = self._initial_step()
        self.step = self.add_weight("step", step.shape, tf.float32, keras.initializers.Constant(step))

    def _initial_step(self):
        kernel = np.abs(kernel_of(self.layer))
        mean = kernel.mean(axis=tuple(range(kernel.ndim - 1))) if self.per_channel else kernel.mean().reshape(1)
        if self._first_step is not None:
            step = np.asarray(self._first_step, np.float32)
            if step.shape != mean.shape or not np.all((step > 0) & np.isfinite(step)):
                raise ValueError(
                    f"the first step of layer {self.layer.name!r} is {step}; it must be above 0, of shape {mean.shape}"
                )
            return step
        # A channel of zeros needs some step size.
        mean = np.where(mean > 0, mean, mean.max() if mean.max() > 0 else 1.0)
        return 2 * mean / np.sqrt(largest_code(self.weight_bits))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        outputs = apply_kernel(self.layer, inputs, self.quantize_kernel())
        if self.layer.use_bias:
            outputs = tf.nn.bias_add(outputs, self.layer.bias)
        return self.layer.activation(outputs)

    def quantize_kernel(self) -> tf.Tensor:
        """Quantizes the kernel, in the layout of `QuantizedKernel`; differentiable."""
        kernel = arrange_kernel(self.layer, getattr(self.layer, kernel_name(self.layer)))
        return _quantize(kernel, tf.maximum(self.step, _SMALLEST_STEP), self.weight_bits)

    def strip(self) -> Callable:
        """Makes a quantized layer with this kernel, a callable on tensors."""
        step = tf.maximum(self.step, _SMALLEST_STEP)
        layer = make_quantized_layer(self.layer, self.per_channel)
        return fill_on_call(layer, self.quantize_kernel(), step, bias_of(self.layer))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "weight_bits": self.weight_bits, "per_channel": self.per_channel}


def _quantize(weights, step, bits):
    lowest, largest = code_range(bits)

    @tf.custom_gradient
    def round_to_step(weights, step):
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

    return round_to_step(weights, step)
