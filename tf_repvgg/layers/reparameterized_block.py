"""What multi-branch blocks share: a 3x3 convolution beside a 1x1 one, and the merged convolution that they become.

Kernels are HWIO, activations NHWC. With t = gamma / sqrt(variance + epsilon) of a branch, per output channel:

    kernel = sum over branches of t * place(branch kernel)        bias = sum over branches of beta - mean * t

where `place` puts a 1x1 kernel or the identity on the centre tap of a 3x3 kernel.
"""

import numbers

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers.batch_norm import scale_and_shift
from tf_repvgg.layers.squeeze_excite import SqueezeExcite

PADDINGS = ("same", "symmetric")

_KERNEL_SIZE = 3


def check_choice(owner, argument, value, known):
    if value not in known:
        raise ValueError(f"{owner}: {argument} is {value!r}; known: {', '.join(known)}")


def scale_kernel(kernel, scale):
    """kernel * scale; under a mixed policy the kernel reads as bfloat16 while a layer runs, statistics as float32."""
    return tf.cast(kernel, scale.dtype) * scale


def place_on_centre(kernel):
    """Puts a 1x1 kernel [1, 1, in, out] on the centre tap of a 3x3 one."""
    return tf.pad(kernel, [[1, 1], [1, 1], [0, 0], [0, 0]])


def output_variance(norm):
    """Variance that a batch normalization gives its output, per channel, on its running statistics."""
    scale, _ = scale_and_shift(norm)
    return tf.square(scale) * norm.moving_variance


class ReparameterizedBlock(keras.layers.Layer):
    """What the blocks share: a 3x3 convolution beside a 1x1 one that reads the pixel under the centre tap.

    A block is ``activation(squeeze_excite(sum of branches))``, the squeeze-and-excite being optional; subclasses add
    their normalizations and say in `branches` what every branch contributes to the merged kernel.

    Args:
      filters: number of output channels.
      strides: step of the output grid, the same in height and width.
      padding: "same" as Keras has it, or "symmetric": one row and column of zeros (times the dilation) on every
        side, as PyTorch-trained weights assume. They differ for strides above 1 only.
      dilation_rate: spacing of the 3x3 taps; only with strides=1.
      groups: number of groups the channels of both convolutions are split into.
      activation: anything `keras.activations.get` accepts.
      se_reduction: None, or the reduction of a `SqueezeExcite` between the sum and the activation.
      momentum, epsilon: of every batch normalization in the block.
      kernel_initializer: of both convolutions, anything `keras.initializers.get` accepts.

    Raises:
      ValueError: where the branches could not be merged exactly.
    """

    def __init__(
        self,
        filters,
        strides=1,
        padding="same",
        dilation_rate=1,
        groups=1,
        activation="relu",
        se_reduction=None,
        momentum=0.9,
        epsilon=1e-5,
        kernel_initializer="he_normal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_choice(self._kind, "padding", padding, PADDINGS)
        counts = {"filters": filters, "strides": strides, "groups": groups, "dilation_rate": dilation_rate}
        for argument, value in counts.items():
            if not (isinstance(value, numbers.Integral) and value > 0):
                raise ValueError(f"{self._kind}: {argument} is {value!r}; it must be a whole number above 0")
        if dilation_rate > 1 and strides > 1:
            raise ValueError(
                f"{self._kind}: dilation {dilation_rate} with stride {strides} cannot be fused exactly; use stride 1"
            )
        if filters % groups:
            raise ValueError(f"{self._kind}: {filters} filters cannot be split into {groups} groups")
        # NumPy's whole numbers become Python's, which a saved configuration can hold.
        self.filters = int(filters)
        self.strides = int(strides)
        self.padding = padding
        self.dilation_rate = int(dilation_rate)
        self.groups = int(groups)
        self.activation = keras.activations.get(activation)
        self.se_reduction = se_reduction
        self.momentum = momentum
        self.epsilon = epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.conv3x3 = self._conv(_KERNEL_SIZE, name="conv3x3")
        self.conv1x1 = self._conv(1, name="conv1x1")
        self.squeeze_excite = self._squeeze_excite(self.dtype_policy)

    @property
    def _kind(self):
        return type(self).__name__

    def _conv(self, size, name):
        spatial = {1: {}, _KERNEL_SIZE: self._spatial_arguments()}[size]
        return keras.layers.Conv2D(
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

    def _squeeze_excite(self, dtype, name=None):
        if self.se_reduction is None:
            return None
        return SqueezeExcite(self.filters, self.se_reduction, name=f"{name or self.name}_se", dtype=dtype)

    def _spatial_arguments(self):
        """Stride, dilation and padding of the 3x3 convolution, in training and in deploy form."""
        padding = "valid" if self.needs_explicit_padding else "same"
        return {"strides": self.strides, "dilation_rate": self.dilation_rate, "padding": padding}

    @property
    def needs_explicit_padding(self) -> bool:
        """True where "symmetric" is not what Keras's "same" does; costs a PAD operation in the exported file."""
        return self.padding == "symmetric" and self.strides > 1

    def _batch_norm(self, name):
        return keras.layers.BatchNormalization(
            momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        channels = input_shape[-1]
        if channels is None:
            raise ValueError(f"{self.name}: the number of input channels must be known, but the shape is {input_shape}")
        if channels % self.groups:
            raise ValueError(f"{self.name}: {channels} input channels cannot be split into {self.groups} groups")
        super().build(input_shape)

    def _keeps_shape(self, input_shape):
        return self.strides == 1 and input_shape[-1] == self.filters

    def _padded(self, inputs):
        return tf.pad(inputs, [[0, 0], [1, 1], [1, 1], [0, 0]]) if self.needs_explicit_padding else inputs

    def _conv3x3(self, inputs):
        return self.conv3x3(self._padded(inputs))

    def _conv1x1(self, inputs):
        """The 1x1 convolution on the pixels under the 3x3 convolution's centre tap.

        A slice, then stride 1: a stride-2 1x1 convolution would read pixel 2i where "same" padding on an even input
        centres the 3x3 taps on 2i+1, and merging would be silently wrong. (It also keeps clear of a heap corruption
        in TensorFlow 2.21's gradient of strided 1x1 convolutions.)
        """
        if self.strides > 1:
            row, column = (self._centre_offset(inputs, axis) for axis in (1, 2))
            inputs = inputs[:, row :: self.strides, column :: self.strides]
        return self.conv1x1(inputs)

    def _centre_offset(self, inputs, axis):
        """Input pixel under the centre tap of output 0: 0 or 1, as the size at run time decides ("same" padding)."""
        if self.padding == "symmetric":
            return 0
        size = inputs.shape[axis]
        if size is None:
            size = tf.shape(inputs)[axis]
        # TensorFlow pads max((ceil(n / s) - 1) * s + 3 - n, 0) in total, the smaller half in front: one row in
        # front when n % s == 1 (or s = 1), and none otherwise.
        return tf.where(size % self.strides == 1, 0, 1) if tf.is_tensor(size) else int(size % self.strides != 1)

    def _activated(self, outputs):
        """What follows the sum of the branches."""
        if self.squeeze_excite is not None:
            outputs = self.squeeze_excite(outputs)
        return self.activation(outputs)

    def _identity_kernel(self):
        """The identity as a 3x3 kernel: shape [3, 3, filters / groups, filters]."""
        eye = tf.tile(tf.eye(self.filters // self.groups), [1, self.groups])
        return place_on_centre(eye[tf.newaxis, tf.newaxis])

    def branches(self):
        """What each branch adds to the merged kernel: {name: (3x3 kernel, bias)}, on running statistics."""
        raise NotImplementedError

    def equivalent_kernel_and_bias(self):
        """The merged kernel [3, 3, in / groups, out] and bias [out], float32; differentiable in every weight."""
        kernels, biases = zip(*self.branches().values(), strict=True)
        return tf.add_n(list(kernels)), tf.add_n(list(biases))

    def pre_activation_statistics(self):
        """(mean, variance) of the merged convolution's output as the normalizations imply, each [out] or None."""
        raise NotImplementedError

    def merged_call(self, inputs, kernel, bias):
        """The block on a merged kernel and bias of any origin, such as a quantized one; differentiable in all."""
        outputs = self.conv3x3.convolution_op(self._padded(inputs), kernel=kernel)
        return self._activated(tf.nn.bias_add(outputs, bias))

    def merged_convolution(self, name=None):
        """The convolution of the deploy form: a new layer without weights, by default named as the block.

        It ends in the block's activation, unless a squeeze-and-excite comes first.
        """
        return keras.layers.Conv2D(
            self.filters,
            _KERNEL_SIZE,
            groups=self.groups,
            activation=self.activation if self.squeeze_excite is None else None,
            name=name or self.name,
            dtype=self.variable_dtype,
            **self._spatial_arguments(),
        )

    def deploy_padding(self, name=None):
        """The layer before that convolution, or None where the block needs none."""
        if not self.needs_explicit_padding:
            return None
        return keras.layers.ZeroPadding2D(1, name=f"{name or self.name}_padding", dtype=self.variable_dtype)

    def deploy_form(self, name=None):
        """The same function of plain layers that are new and hold the merged weights, as a callable on tensors.

        They are a convolution called `name`, by default as the block, and where the block needs them padding before and
        squeeze-and-excite and activation after it. They compute in the type of the weights, whatever policy trained
        them or is set now.
        """
        name = name or self.name
        conv = self.merged_convolution(name)
        kernel, bias = self.equivalent_kernel_and_bias()
        conv.build((None, None, None, kernel.shape[2] * self.groups))
        conv.set_weights([kernel.numpy(), bias.numpy()])
        layers = [conv]
        if (padding := self.deploy_padding(name)) is not None:
            layers.insert(0, padding)
        if self.squeeze_excite is not None:
            tail = self._squeeze_excite(self.variable_dtype, name)
            tail.copy_weights(self.squeeze_excite)
            activation = keras.layers.Activation(self.activation, name=f"{name}_activation", dtype=self.variable_dtype)
            # Past its __call__, so that a functional model holds its layers and not the custom layer.
            layers += [tail.call, activation]

        def call(inputs):
            for layer in layers:
                inputs = layer(inputs)
            return inputs

        return call

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        sizes = [None if size is None else -(-size // self.strides) for size in (height, width)]
        return tf.TensorShape([batch, *sizes, self.filters])

    def get_config(self):
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
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
