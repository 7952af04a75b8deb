"""A convolution in groups whose groups may have one channel, as in depthwise blocks."""

import tensorflow as tf
import tf_keras as keras


@keras.saving.register_keras_serializable(package="tf_repvgg")
class GroupedConvolution(keras.layers.Conv2D):
    """Conv2D that computes a depthwise convolution where every group has one input channel.

    Keras compiles the convolutions of a Conv2D with groups by XLA, whose depthwise convolutions are more than ten times
    slower on CPUs. The kernel remains that of a Conv2D, [height, width, 1, out], which its initializer sees.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if not self._is_depthwise(self.kernel):
            return super().call(inputs)
        outputs = self.convolution_op(inputs, tf.convert_to_tensor(self.kernel))
        return self.activation(tf.nn.bias_add(outputs, self.bias) if self.use_bias else outputs)

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        if not self._is_depthwise(kernel):
            return super().convolution_op(inputs, kernel)
        depthwise_kernel = tf.reshape(kernel, [*self.kernel_size, self.groups, self.filters // self.groups])
        strides = [1, *self.strides, 1]
        return tf.nn.depthwise_conv2d(
            inputs, depthwise_kernel, strides, self.padding.upper(), dilations=list(self.dilation_rate)
        )

    def _is_depthwise(self, kernel):
        return self.groups > 1 and kernel.shape[2] == 1
