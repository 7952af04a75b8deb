"""Arithmetic on convolution kernels [height, width, in / groups, out]."""

import tensorflow as tf


def scale_kernel(kernel: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """kernel * scale, in the type of the scale.

    Under a mixed policy the kernel reads as bfloat16 while a layer runs, statistics as float32.
    """
    return tf.cast(kernel, scale.dtype) * scale


def place_on_centre(kernel: tf.Tensor) -> tf.Tensor:
    """Puts a kernel [1, 1, in / groups, out] on the centre tap of a kernel [3, 3, in / groups, out] of zeros."""
    return tf.pad(kernel, [[1, 1], [1, 1], [0, 0], [0, 0]])


def identity_kernel(channels: int, groups: int) -> tf.Tensor:
    """The identity as a 3x3 kernel: shape [3, 3, channels / groups, channels]."""
    eye = tf.tile(tf.eye(channels // groups), [1, groups])
    return place_on_centre(eye[tf.newaxis, tf.newaxis])
