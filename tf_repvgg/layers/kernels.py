"""Arithmetic on convolution kernels [height, width, in / groups, out]."""

import tensorflow as tf


def scale_kernel(kernel: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """kernel * scale, in the type of the scale.

    Under a mixed policy the kernel reads as bfloat16 while a layer runs, statistics as float32.
    """
    return tf.cast(kernel, scale.dtype) * scale


def place_on_centre(kernel: tf.Tensor, size: int) -> tf.Tensor:
    """Surrounds a kernel of odd height and width with zeros: [height, width, in / groups, out] to [size, size, ...]."""
    margin = (size - kernel.shape[0]) // 2
    return tf.pad(kernel, [[margin, margin], [margin, margin], [0, 0], [0, 0]])


def identity_kernel(channels: int, groups: int, size: int) -> tf.Tensor:
    """The identity as a kernel [size, size, channels / groups, channels]."""
    eye = tf.tile(tf.eye(channels // groups), [1, groups])
    return place_on_centre(eye[tf.newaxis, tf.newaxis], size)
