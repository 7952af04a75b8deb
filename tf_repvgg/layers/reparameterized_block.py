"""Base of multi-branch blocks: convolutions side by side, and the merged convolution that they become.

Kernels are HWIO, activations NHWC. With t = gamma / sqrt(variance + epsilon) of a branch, per output channel:

    kernel = sum over branches of t * place(branch kernel)        bias = sum over branches of beta - mean * t

where `place` puts a 1x1 kernel or the identity on the centre tap of a larger kernel.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.grouped_convolution import GroupedConvolution
from tf_repvgg.layers.kernels import identity_kernel
from tf_repvgg.layers.squeeze_excite import SqueezeExcite

PADDINGS = ("same", "symmetric")

# Those of RepVGG.
_CONVOLUTIONS = MappingProxyType({"3x3": 3, "1x1": 1})


def check_choice(owner: str, argument: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError if the value of an argument is not one of its choices."""
    if value not in choices:
        raise ValueError(f"{owner}: {argument} is {value!r}; known: {', '.join(choices)}")


class ReparameterizedBlock(keras.layers.Layer):
    """Base of the blocks: convolutions side by side, of which the smaller read the pixel under the centre tap.

    A block is ``activation(squeeze_excite(sum of branches))``, where the squeeze-and-excite is optional. Subclasses
    add their normalizations, compute the sum in `call`, and give the part of each branch in the merged kernel in
    `branches`. A convolution and its normalization are the attributes `conv3x3` and `norm3x3`, `conv1x1` and `norm1x1`,
    or with other suffixes in place of 3x3 and 1x1.

    Args:
      filters: Number of output channels.
      strides: Stride, the same in height and width.
      padding: "same" as in Keras, or "symmetric": one row and column of zeros (times the dilation) on every side, as
        weights trained in PyTorch assume. They differ for strides above 1 only.
      dilation_rate: Spacing of the taps; only with strides=1.
      groups: Number of groups that the channels of all convolutions are split into. With one input channel in each, the
        merged convolution is a DepthwiseConv2D.
      activation: Activation, anything that `keras.activations.get` accepts.
      se_reduction: Reduction of a squeeze-and-excite between the sum and the activation; None for no such layer.
      momentum: Momentum of the running statistics of every batch normalization in the block.
      epsilon: Epsilon of every batch normalization in the block.
      synchronized: Whether every batch normalization computes the statistics of the global batch under a distribution
        strategy; otherwise each replica has those of its own images.
      kernel_initializer: Initializer of all convolutions, anything that `keras.initializers.get` accepts.
      convolutions: Kernel sizes of the convolutions by suffix, given by the subclass: odd numbers, the largest first.
      **kwargs: Arguments of `keras.layers.Layer`.

    Attributes:
      kernel_size: Height and width of the merged kernel.

    Raises:
      ValueError: If the branches could not be merged exactly.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers import ReparameterizedBlock, RepVGGBlock
      >>> block = RepVGGBlock(8, strides=2, name="block")
      >>> isinstance(block, ReparameterizedBlock), block(keras.Input((9, 8, 4))).shape
      (True, TensorShape([None, 5, 4, 8]))
      >>> kernel, bias = block.equivalent_kernel_and_bias()
      >>> kernel.shape, bias.shape
      (TensorShape([3, 3, 4, 8]), TensorShape([8]))
    """

    def __init__(
        self,
        filters: int,
        strides: int = 1,
        padding: str = "same",
        dilation_rate: int = 1,
        groups: int = 1,
        activation: str | Callable | None = "relu",
        se_reduction: int | None = None,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        synchronized: bool = False,
        kernel_initializer: Any = "he_normal",
        convolutions: Mapping[str, int] = _CONVOLUTIONS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice(self._kind, "padding", padding, PADDINGS)
        counts = {"filters": filters, "strides": strides, "groups": groups, "dilation_rate": dilation_rate}
        for argument, value in counts.items():
            if not (isinstance(value, int | np.integer) and value > 0):
                raise ValueError(f"{self._kind}: {argument} is {value!r}; it must be a whole number above 0")
        if dilation_rate > 1 and strides > 1:
            raise ValueError(
                f"{self._kind}: dilation {dilation_rate} with stride {strides} cannot be fused exactly; use stride 1"
            )
        if filters % groups:
            raise ValueError(f"{self._kind}: {filters} filters cannot be split into {groups} groups")
        # A saved configuration can hold Python's whole numbers, but not NumPy's.
        self.filters = int(filters)
        self.strides = int(strides)
        self.padding = padding
        self.dilation_rate = int(dilation_rate)
        self.groups = int(groups)
        self.activation = keras.activations.get(activation)
        self.se_reduction = se_reduction
        self.momentum = momentum
        self.epsilon = epsilon
        self.synchronized = synchronized
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_size = max(convolutions.values())
        self._suffixes = tuple(convolutions)
        for suffix, size in convolutions.items():
            setattr(self, f"conv{suffix}", self._make_conv(size, name=f"conv{suffix}"))
        self.squeeze_excite = self._make_squeeze_excite(self.dtype_policy)

    @property
    def _kind(self):
        return type(self).__name__

    def _make_conv(self, size, name):
        spatial = self._spatial_arguments() if size > 1 else {}
        # Keras looks weights up in files by the class of a layer: where it need not be another one, it stays Conv2D.
        kind = GroupedConvolution if self.groups == self.filters > 1 else keras.layers.Conv2D
        return kind(
            self.filters,
            size,
            groups=self.groups,
            use_bias=False,
            # A copy for each convolution: an initializer instance draws the same values on every call.
            kernel_initializer=keras.initializers.get(keras.initializers.serialize(self.kernel_initializer)),
            dtype=self.dtype_policy,
            name=name,
            **spatial,
        )

    def _make_squeeze_excite(self, dtype, name=None):
        if self.se_reduction is None:
            return None
        return SqueezeExcite(self.filters, self.se_reduction, name=f"{name or self.name}_se", dtype=dtype)

    def _spatial_arguments(self):
        """Stride, dilation and padding of the largest convolution, in training and in deploy form."""
        padding = "valid" if self.needs_explicit_padding else "same"
        return {"strides": self.strides, "dilation_rate": self.dilation_rate, "padding": padding}

    @property
    def needs_explicit_padding(self) -> bool:
        """Whether "symmetric" padding differs from Keras's "same"; it costs a PAD operation in the exported file."""
        return self.padding == "symmetric" and self.strides > 1 and self.kernel_size > 1

    def _make_batch_norm(self, name, kind=keras.layers.BatchNormalization, **options):
        return kind(
            momentum=self.momentum,
            epsilon=self.epsilon,
            synchronized=self.synchronized,
            dtype=self.dtype_policy,
            name=name,
            **options,
        )

    def build(self, input_shape: Any) -> None:
        channels = input_shape[-1]
        if channels is None:
            raise ValueError(f"{self.name}: the number of input channels must be known, but the shape is {input_shape}")
        if channels % self.groups:
            raise ValueError(f"{self.name}: {channels} input channels cannot be split into {self.groups} groups")
        super().build(input_shape)

    def _keeps_shape(self, input_shape):
        return self.strides == 1 and input_shape[-1] == self.filters

    # Not a property: when Keras saves a model, it would take every property that holds a layer for the layer's name.
    def get_convolutions(self) -> dict[str, keras.layers.Conv2D]:
        """The convolutions by branch, as "conv3x3": one of the size of the merged kernel first."""
        return {f"conv{suffix}": getattr(self, f"conv{suffix}") for suffix in self._suffixes}

    @property
    def may_have_identity(self) -> bool:
        """Whether the block keeps the shape of its input, so that an identity branch is possible."""
        return self._keeps_shape([self._get_main_convolution().kernel.shape[2] * self.groups])

    def _get_main_convolution(self):
        return next(iter(self.get_convolutions().values()))

    def _prepare(self, inputs, kernel_size):
        """The input of a convolution: padded, or for a 1x1 convolution the pixels under the largest one's centre tap.

        A slice, then stride 1: a stride-2 1x1 convolution would read pixel 2i where "same" padding on an even input
        centres the 3x3 taps on 2i+1, and merging would be silently wrong. (It also keeps clear of a heap corruption
        in TensorFlow 2.21's gradient of strided 1x1 convolutions.)
        """
        if kernel_size == 1 and self.strides > 1:
            row, column = (self._centre_offset(inputs, axis) for axis in (1, 2))
            return inputs[:, row :: self.strides, column :: self.strides]
        if self.needs_explicit_padding and kernel_size > 1:
            margin = [self.kernel_size // 2] * 2
            return tf.pad(inputs, [[0, 0], margin, margin, [0, 0]])
        return inputs

    def _convolve(self, conv, inputs):
        return conv(self._prepare(inputs, conv.kernel_size[0]))

    def _centre_offset(self, inputs, axis):
        """Input pixel under the centre tap of output 0, as the size at run time decides ("same" padding)."""
        if self.padding == "symmetric":
            return 0
        size = inputs.shape[axis]
        if size is None:
            size = tf.shape(inputs)[axis]
        # TensorFlow pads max((ceil(n / s) - 1) * s + k - n, 0) in total, the smaller half in front. With r the pixels
        # of the last window, n % s or s, this puts the centre on min(r, k) // 2.
        last = (size - 1) % self.strides + 1
        return tf.minimum(last, self.kernel_size) // 2 if tf.is_tensor(last) else min(last, self.kernel_size) // 2

    def _activate(self, outputs):
        """Squeeze-and-excite, if there is one, and activation of the sum of the branches."""
        if self.squeeze_excite is not None:
            outputs = self.squeeze_excite(outputs)
        return self.activation(outputs)

    def _identity_kernel(self):
        return identity_kernel(self.filters, self.groups, self.kernel_size)

    def branches(self) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        """The part of each branch in the merged convolution, on running statistics.

        Returns:
          {name: (kernel [kernel_size, kernel_size, in / groups, out], bias [out])}.
        """
        raise NotImplementedError

    def equivalent_kernel_and_bias(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The merged kernel [kernel_size, kernel_size, in / groups, out] and bias [out], float32.

        Differentiable in every weight.

        Example:
          >>> import tf_keras as keras
          >>> from tf_repvgg.layers import QARepVGGBlock
          >>> block = QARepVGGBlock(8, groups=2)
          >>> outputs = block(keras.Input((8, 8, 4)))
          >>> kernel, bias = block.equivalent_kernel_and_bias()
          >>> kernel.shape, bias.shape
          (TensorShape([3, 3, 2, 8]), TensorShape([8]))
        """
        kernels, biases = zip(*self.branches().values(), strict=True)
        return tf.add_n(list(kernels)), tf.add_n(list(biases))

    def pre_activation_statistics(self) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Mean and variance of the merged convolution's output as the normalizations imply them: each [out].

        None where the normalizations do not determine them.
        """
        raise NotImplementedError

    def call_merged(self, inputs: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        """Computes the block with another merged kernel and bias, such as quantized ones; differentiable in all.

        Args:
          inputs: Images [batch, height, width, in].
          kernel: Kernel [kernel_size, kernel_size, in / groups, out].
          bias: Bias [out].
        """
        outputs = self._get_main_convolution().convolution_op(self._prepare(inputs, self.kernel_size), kernel=kernel)
        return self._activate(tf.nn.bias_add(outputs, bias))

    def make_merged_convolution(self, name: str | None = None) -> keras.layers.Conv2D | keras.layers.DepthwiseConv2D:
        """Makes the convolution of the deploy form, without weights.

        It ends in the block's activation, unless a squeeze-and-excite comes first. It is a DepthwiseConv2D where each
        group has one input channel.

        Args:
          name: Name of the convolution; by default that of the block.
        """
        arguments = {
            "kernel_size": self.kernel_size,
            "activation": self.activation if self.squeeze_excite is None else None,
            "name": name or self.name,
            "dtype": self.variable_dtype,
            **self._spatial_arguments(),
        }
        if self._is_depthwise:
            return keras.layers.DepthwiseConv2D(depth_multiplier=self.filters // self.groups, **arguments)
        return keras.layers.Conv2D(self.filters, groups=self.groups, **arguments)

    @property
    def _is_depthwise(self):
        return self.groups > 1 and self._get_main_convolution().kernel.shape[2] == 1

    def make_deploy_padding(self, name: str | None = None) -> keras.layers.ZeroPadding2D | None:
        """Makes the layer before the merged convolution; None if the block needs none.

        Args:
          name: Name of the convolution; by default that of the block.
        """
        if not self.needs_explicit_padding:
            return None
        margin = self.kernel_size // 2
        return keras.layers.ZeroPadding2D(margin, name=f"{name or self.name}_padding", dtype=self.variable_dtype)

    def make_deploy_form(self, name: str | None = None) -> Callable[[tf.Tensor], tf.Tensor]:
        """Makes plain layers that compute the same function and hold the merged weights, as a callable on tensors.

        They are a convolution, where needed padding before it, and if the block has a squeeze-and-excite, that and the
        activation after it. They compute in the type of the weights, whatever policy trained them or is set now.

        Args:
          name: Name of the convolution; by default that of the block.
        """
        name = name or self.name
        conv = self.make_merged_convolution(name)
        kernel, bias = self.equivalent_kernel_and_bias()
        conv.build((None, None, None, kernel.shape[2] * self.groups))
        conv.set_weights([np.reshape(kernel, conv.weights[0].shape), bias.numpy()])
        layers = [conv]
        if (padding := self.make_deploy_padding(name)) is not None:
            layers.insert(0, padding)
        if self.squeeze_excite is not None:
            squeeze_excite = self._make_squeeze_excite(self.variable_dtype, name)
            squeeze_excite.copy_weights(self.squeeze_excite)
            activation = keras.layers.Activation(self.activation, name=f"{name}_activation", dtype=self.variable_dtype)
            # Past its __call__, so that a functional model holds its layers and not the custom layer.
            layers += [squeeze_excite.call, activation]

        def call(inputs):
            for layer in layers:
                inputs = layer(inputs)
            return inputs

        return call

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        batch, height, width, _ = input_shape
        sizes = [None if size is None else -(-size // self.strides) for size in (height, width)]
        return tf.TensorShape([batch, *sizes, self.filters])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "activation": keras.activations.serialize(self.activation),
            "se_reduction": self.se_reduction,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "synchronized": self.synchronized,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
