"""Layers whose kernel lies on an integer grid: what every way of quantizing weights ends in, and what is exported."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.uniform import LARGEST_CODE, QuantizedKernel

# Layers whose kernels are quantized; subclasses included.
WEIGHTED_LAYERS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)


class QuantizedLayer:
    """A layer with a kernel of int8 codes times a scale; a plain layer otherwise, kernel and bias included.

    The kernel is stored as it is multiplied with, in float32; `scale` is one more weight beside kernel and bias, and
    codes are read back from both, exactly.

    Args:
      per_channel: whether there is a scale for each output channel, or one.
      **kwargs: those of the plain layer.
    """

    def __init__(self, *args, per_channel=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.per_channel = per_channel

    def build(self, input_shape):
        super().build(input_shape)
        count = self.codes_shape[-1] if self.per_channel else 1
        self.scale = self.add_weight("scale", [count], tf.float32, keras.initializers.Ones(), trainable=False)

    def set_quantized_kernel(self, quantized: QuantizedKernel):
        """Takes over codes and scale.

        Raises:
          ValueError: if their shapes are not the layer's.
        """
        expected, found = ((self.codes_shape, tuple(self.scale.shape)), (quantized.codes.shape, quantized.scale.shape))
        if found != expected:
            raise ValueError(
                f"layer {self.name!r}: codes and scale have shapes {found[0]} and {found[1]}; the layer needs "
                f"{expected[0]} and {expected[1]}"
            )
        self._kernel.assign(quantized.dequantize().reshape(self._kernel.shape))
        self.scale.assign(quantized.scale)

    def quantized_kernel(self) -> QuantizedKernel:
        """Codes and scale, output channels last (see `QuantizedKernel`).

        Raises:
          ValueError: if the kernel is not on its grid, as after training it as a plain weight.
        """
        kernel, scale = self._kernel.numpy().reshape(self.codes_shape), self.scale.numpy()
        codes = np.round(kernel / scale)
        if not (np.all(np.abs(codes) <= LARGEST_CODE) and np.array_equal(codes.astype(np.float32) * scale, kernel)):
            raise ValueError(
                f"layer {self.name!r}: the kernel is not on its grid of int8 codes; was it trained, or its weights "
                "set, after quantization?"
            )
        return QuantizedKernel(codes.astype(np.int8), scale)

    @property
    def _kernel(self):
        return self.kernel

    @property
    def codes_shape(self):
        """Shape of the codes (see `QuantizedKernel`), once the layer is built."""
        return tuple(self._kernel.shape)

    def get_config(self):
        return {**super().get_config(), "per_channel": self.per_channel}


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedConv2D(QuantizedLayer, keras.layers.Conv2D):
    """Conv2D with its kernel on a grid."""


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedDense(QuantizedLayer, keras.layers.Dense):
    """Dense with its kernel on a grid."""


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedDepthwiseConv2D(QuantizedLayer, keras.layers.DepthwiseConv2D):
    """DepthwiseConv2D with its kernel on a grid; codes are those of the grouped convolution that it is."""

    @property
    def _kernel(self):
        return self.depthwise_kernel

    @property
    def codes_shape(self):
        height, width, channels, multiplier = self.depthwise_kernel.shape
        return height, width, 1, channels * multiplier


def kernel_of(layer) -> np.ndarray:
    """The kernel of a Conv2D, DepthwiseConv2D or Dense layer in the layout of `QuantizedKernel`."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        kernel = layer.depthwise_kernel.numpy()
        return kernel.reshape(*kernel.shape[:2], 1, -1)
    return layer.kernel.numpy()


def bias_of(layer) -> np.ndarray:
    """The bias of such a layer, zeros where it has none: shape [output channels]."""
    return layer.bias.numpy() if layer.use_bias else np.zeros(kernel_of(layer).shape[-1], np.float32)


def linear(layer, inputs, kernel):
    """What a layer computes with another kernel, in the layout of `QuantizedKernel`, without bias and activation."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        kernel = tf.reshape(kernel, layer.depthwise_kernel.shape)
        return keras.backend.depthwise_conv2d(
            inputs, kernel, layer.strides, layer.padding, dilation_rate=layer.dilation_rate
        )
    if isinstance(layer, keras.layers.Dense):
        return tf.tensordot(inputs, kernel, 1)
    return layer.convolution_op(inputs, kernel=kernel)


_QUANTIZED_FORMS = {
    keras.layers.Conv2D: QuantizedConv2D,
    keras.layers.Dense: QuantizedDense,
    keras.layers.DepthwiseConv2D: QuantizedDepthwiseConv2D,
}


def has_quantized_form(layer) -> bool:
    """Whether the layer is of a class that `quantized_form` knows; a subclass may do more with its kernel."""
    return type(layer) in _QUANTIZED_FORMS


def quantized_form(layer, per_channel, **changes):
    """A new quantized layer in the configuration of a plain one; it has its weights once it is called.

    Raises:
      ValueError: if the layer is of no class that has a quantized form.
    """
    if not has_quantized_form(layer):
        raise ValueError(
            f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be quantized; Conv2D, "
            "DepthwiseConv2D and Dense can"
        )
    config = layer.get_config() | {"dtype": layer.variable_dtype, "per_channel": per_channel} | changes
    return _QUANTIZED_FORMS[type(layer)].from_config(config)


def fill_weights(form: QuantizedLayer, kernel, scale, bias):
    """A new quantized layer as a callable on tensors, which puts weights into it once it is built.

    Args:
      form: see `quantized_form`.
      kernel: tensor or array that lies on the grid; any shape with the codes in order.
      scale: float32 [1 or output channels].
      bias: [output channels]; left out where the layer has none.
    """

    def call(*arguments, **keywords):
        outputs = form(*arguments, **keywords)
        steps = np.asarray(scale, np.float32)
        codes = np.round(np.reshape(kernel, form.codes_shape) / steps).astype(np.int8)
        form.set_quantized_kernel(QuantizedKernel(codes, steps))
        if form.use_bias:
            form.bias.assign(bias)
        return outputs

    return call
