"""Layers whose kernel lies on an integer grid: the result of every way to quantize weights, and what is exported."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.uniform import LARGEST_CODE, QuantizedKernel

# Layers whose kernels are quantized; subclasses included.
WEIGHTED_LAYERS = (
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
)


def name_weighted_layers(conjunction: str) -> str:
    """The names of `WEIGHTED_LAYERS`, for messages: "Conv2D, Conv2DTranspose, DepthwiseConv2D and Dense".

    Args:
      conjunction: Word before the last name.
    """
    *others, last = (layer_class.__name__ for layer_class in WEIGHTED_LAYERS)
    return f"{', '.join(others)} {conjunction} {last}"


class QuantizedLayer(keras.layers.Layer):
    """Base of the layers whose kernel is int8 codes times a scale; in all else they are plain layers.

    The layer stores the float32 kernel that it multiplies with, and `scale` as one more weight. Codes are read back
    from both, exactly.

    Args:
      *args: Arguments of the plain layer.
      per_channel: Whether every output channel has its own scale; otherwise the kernel has one.
      **kwargs: Keyword arguments of the plain layer.

    Attributes:
      per_channel: Whether every output channel has its own scale.
      scale: Scale of the codes, a float32 variable of shape [1] or [output channels].

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import QuantizedLayer, ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> quantized = ptq.quantize(model, weight_bits=4, calibration=[[[[0.5] * 3] * 8] * 8])
      >>> for layer in quantized.layers:
      ...     if isinstance(layer, QuantizedLayer):
      ...         print(layer.name, layer.codes_shape, layer.get_quantized_kernel().codes.max())
      conv (3, 3, 3, 4) 7
    """

    def __init__(self, *args: Any, per_channel: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.per_channel = per_channel

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        count = self.codes_shape[-1] if self.per_channel else 1
        self.scale = self.add_weight("scale", [count], tf.float32, keras.initializers.Ones(), trainable=False)

    def set_quantized_kernel(self, quantized: QuantizedKernel) -> None:
        """Sets kernel and scale.

        Args:
          quantized: Codes of shape `codes_shape`, and their scale.

        Raises:
          ValueError: If the shapes do not fit the layer.
        """
        expected = self.codes_shape, tuple(self.scale.shape)
        actual = quantized.codes.shape, quantized.scale.shape
        if actual != expected:
            raise ValueError(
                f"layer {self.name!r}: codes and scale have shapes {actual[0]} and {actual[1]}; the layer needs "
                f"{expected[0]} and {expected[1]}"
            )
        self._kernel.assign(restore_kernel(self, quantized.dequantize()))
        self.scale.assign(quantized.scale)

    def get_quantized_kernel(self) -> QuantizedKernel:
        """Reads codes and scale back from the kernel.

        Raises:
          ValueError: If the kernel is not on its grid, for example after it was trained as a plain weight.
        """
        kernel, scale = kernel_of(self), self.scale.numpy()
        codes = np.round(kernel / scale)
        if not (np.all(np.abs(codes) <= LARGEST_CODE) and np.array_equal(codes.astype(np.float32) * scale, kernel)):
            raise ValueError(
                f"layer {self.name!r}: the kernel is not on its grid of int8 codes; was it trained, or its weights "
                "set, after quantization?"
            )
        return QuantizedKernel(codes.astype(np.int8), scale)

    @property
    def _kernel(self):
        return _kernel_variable(self)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of the codes (see `QuantizedKernel`), once the layer is built."""
        return tuple(arrange_kernel(self, self._kernel).shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "per_channel": self.per_channel}


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedConv2D(QuantizedLayer, keras.layers.Conv2D):
    """Conv2D with its kernel on a grid; see `QuantizedLayer`.

    Example:
      >>> from tf_repvgg.quantization import QuantizedConv2D
      >>> layer = QuantizedConv2D(4, 3, per_channel=True)
      >>> layer.build((None, 8, 8, 3))
      >>> layer.codes_shape, layer.scale.shape
      ((3, 3, 3, 4), TensorShape([4]))
    """


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedDense(QuantizedLayer, keras.layers.Dense):
    """Dense with its kernel on a grid; see `QuantizedLayer`.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization import QuantizedDense, quantize_min_max
      >>> layer = QuantizedDense(2, per_channel=False)
      >>> layer.build((None, 1))
      >>> layer.set_quantized_kernel(quantize_min_max(np.array([[4.0, -127.0]]), per_channel=False))
      >>> layer.get_quantized_kernel().codes.tolist()
      [[4, -127]]
    """


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedDepthwiseConv2D(QuantizedLayer, keras.layers.DepthwiseConv2D):
    """DepthwiseConv2D with its kernel on a grid; its codes have the layout of a grouped convolution.

    Example:
      >>> from tf_repvgg.quantization import QuantizedDepthwiseConv2D
      >>> layer = QuantizedDepthwiseConv2D(3, depth_multiplier=2)
      >>> layer.build((None, 8, 8, 5))
      >>> layer.codes_shape
      (3, 3, 1, 10)
    """


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedConv2DTranspose(QuantizedLayer, keras.layers.Conv2DTranspose):
    """Conv2DTranspose with its kernel on a grid; its codes have the output channels last, unlike Keras's kernel.

    Example:
      >>> from tf_repvgg.quantization import QuantizedConv2DTranspose
      >>> layer = QuantizedConv2DTranspose(4, 3, strides=2)
      >>> layer.build((None, 8, 8, 5))
      >>> layer.codes_shape
      (3, 3, 5, 4)
    """


def arrange_kernel(layer: keras.layers.Layer, kernel: Any) -> tf.Tensor:
    """Gives the kernel of a layer of `WEIGHTED_LAYERS` the layout of `QuantizedKernel`; differentiable.

    Args:
      layer: Layer whose class says how the kernel is laid out.
      kernel: Kernel, or any array of its shape, as the layer holds it.
    """
    kernel = tf.convert_to_tensor(kernel)
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return tf.reshape(kernel, [*kernel.shape[:2], 1, kernel.shape[2] * kernel.shape[3]])
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return tf.linalg.matrix_transpose(kernel)
    return kernel


def restore_kernel(layer: keras.layers.Layer, kernel: Any) -> tf.Tensor:
    """Gives a kernel in the layout of `QuantizedKernel` the layout in which the layer holds it; differentiable.

    Args:
      layer: Layer of `WEIGHTED_LAYERS`, built.
      kernel: Kernel, output channels last.
    """
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return tf.reshape(kernel, layer.depthwise_kernel.shape)
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return tf.linalg.matrix_transpose(kernel)
    return tf.convert_to_tensor(kernel)


def kernel_name(layer: keras.layers.Layer) -> str:
    """Name of the attribute that is the kernel of a layer of `WEIGHTED_LAYERS`."""
    return "depthwise_kernel" if isinstance(layer, keras.layers.DepthwiseConv2D) else "kernel"


def _kernel_variable(layer):
    return getattr(layer, kernel_name(layer))


def kernel_of(layer: keras.layers.Layer) -> np.ndarray:
    """The kernel of a layer of `WEIGHTED_LAYERS` in the layout of `QuantizedKernel`."""
    return arrange_kernel(layer, _kernel_variable(layer)).numpy()


def bias_of(layer: keras.layers.Layer) -> np.ndarray:
    """The bias of a layer of `WEIGHTED_LAYERS`, [output channels]; zeros if it has none."""
    return layer.bias.numpy() if layer.use_bias else np.zeros(kernel_of(layer).shape[-1], np.float32)


def apply_kernel(layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Computes a layer of `WEIGHTED_LAYERS` with another kernel, without bias and activation.

    Args:
      layer: Layer with the strides, padding and dilation rate to use.
      inputs: Inputs of the layer.
      kernel: Kernel in the layout of `QuantizedKernel`.

    Returns:
      Linear outputs of the layer.
    """
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return keras.backend.depthwise_conv2d(
            inputs,
            restore_kernel(layer, kernel),
            layer.strides,
            layer.padding,
            dilation_rate=layer.dilation_rate,
        )
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return _apply_transposed(layer, tf.convert_to_tensor(inputs), restore_kernel(layer, kernel))
    if isinstance(layer, keras.layers.Dense):
        return tf.tensordot(inputs, kernel, 1)
    return layer.convolution_op(inputs, kernel=kernel)


def _apply_transposed(layer, inputs, kernel):
    batch, *size, _ = (
        static if static is not None else dynamic
        for static, dynamic in zip(inputs.shape, tf.unstack(tf.shape(inputs)), strict=True)
    )
    # Every pixel of the input adds a stride to the output, the first one adds more or less.
    _, *first, channels = layer.compute_output_shape([1, 1, 1, inputs.shape[-1]])
    size = [(count - 1) * stride + start for count, stride, start in zip(size, layer.strides, first, strict=True)]
    return keras.backend.conv2d_transpose(
        inputs,
        kernel,
        tf.stack([batch, *size, channels]),
        layer.strides,
        layer.padding,
        dilation_rate=layer.dilation_rate,
    )


_QUANTIZED_CLASSES = {
    keras.layers.Conv2D: QuantizedConv2D,
    keras.layers.Conv2DTranspose: QuantizedConv2DTranspose,
    keras.layers.Dense: QuantizedDense,
    keras.layers.DepthwiseConv2D: QuantizedDepthwiseConv2D,
}


def is_quantizable(layer: keras.layers.Layer) -> bool:
    """Whether `make_quantized_layer` accepts a layer. It refuses subclasses, which may do more with their kernel."""
    return type(layer) in _QUANTIZED_CLASSES


def holds_float_kernel(layer: keras.layers.Layer, classes: tuple[type, ...] = WEIGHTED_LAYERS) -> bool:
    """Whether a layer is of these classes, and its kernel not on a grid already, as that of a `QuantizedLayer` is."""
    return isinstance(layer, classes) and not isinstance(layer, QuantizedLayer)


def make_quantized_layer(layer: keras.layers.Layer, per_channel: bool, **changes: Any) -> QuantizedLayer:
    """Makes a quantized layer with the configuration of a plain layer; its weights do not carry over.

    Args:
      layer: Layer of exactly one of the classes `WEIGHTED_LAYERS`.
      per_channel: Whether every output channel gets its own scale.
      **changes: Changes to the configuration of the layer.

    Returns:
      A new layer that is not built.

    Raises:
      ValueError: If the layer is of another class.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import make_quantized_layer
      >>> layer = make_quantized_layer(keras.layers.Dense(2, name="logits"), per_channel=False, use_bias=False)
      >>> type(layer).__name__, layer.name, layer.use_bias
      ('QuantizedDense', 'logits', False)
    """
    if not is_quantizable(layer):
        raise ValueError(
            f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be quantized; "
            f"{name_weighted_layers('and')} can"
        )
    config = layer.get_config() | {"dtype": layer.variable_dtype, "per_channel": per_channel} | changes
    return _QUANTIZED_CLASSES[type(layer)].from_config(config)


def fill_on_call(layer: QuantizedLayer, kernel: Any, scale: Any, bias: np.ndarray) -> Callable:
    """Makes a callable that calls a new quantized layer and then sets its weights, which exist only from then on.

    Args:
      layer: Layer that is not built; see `make_quantized_layer`.
      kernel: Tensor or array on the grid, in the layout of `QuantizedKernel`; as a matrix [-1, output channels] too.
      scale: Scale of the codes, float32, [1] or [output channels].
      bias: Bias, [output channels]; ignored if the layer has none.

    Returns:
      A callable with the arguments and outputs of the layer.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        outputs = layer(*arguments, **keywords)
        scale_array = np.asarray(scale, np.float32)
        codes = np.round(np.reshape(kernel, layer.codes_shape) / scale_array).astype(np.int8)
        layer.set_quantized_kernel(QuantizedKernel(codes, scale_array))
        if layer.use_bias:
            layer.bias.assign(bias)
        return outputs

    return call
