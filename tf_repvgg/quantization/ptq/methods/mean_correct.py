"""Bias correction behind the activation: no layer shifts the mean of what the next layers read."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.ptq.methods.bias_correct import keep_if_better
from tf_repvgg.quantization.ptq.methods.mse import mse
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.walk import Walk
from tf_repvgg.quantization.quantized_layers import apply_kernel

# Values of each channel, evenly spaced over images and pixels, whose mean stands for all.
_SAMPLES = 2**14
_IMAGES_OF_A_BATCH = 32
_HALVINGS = 24
# Largest correction beyond that of the linear output, in standard deviations of the quantized linear output. A channel
# that an activation keeps at zero has no mean to restore.
_LARGEST_STEP = 2.0
# Activations that never fall, so that there is one bias for every mean between the ends of their range.
_RISING = ("elu", "hard_sigmoid", "leaky_relu", "relu", "relu6", "selu", "sigmoid", "softplus", "tanh")


def mean_correct(network: Network) -> None:
    """Sets each bias so that the mean of the layer's output, its activation included, is that of the float layer.

    Bias correction (arXiv:1906.04721, section 4.2) restores the mean before the activation. Where quantization has made
    the spread of a channel smaller, as clipping does, its mean behind a ReLU is then still too small, layer after
    layer. Here it is the mean behind the activation that counts, from the first layer to the last, on inputs of the
    network quantized so far. Activations that rise and fall, such as swish, keep the mean before them.

    All corrections are undone if they do not reduce the error of the network's outputs.
    """
    if not network.is_complete:
        mse(network)
    keep_if_better(network, _correct_means, "mean correction")


def _correct_means(network: Network) -> float:
    """Sets all biases; returns the error of the network's outputs afterwards."""
    names = [name for name, layer in network.layers.items() if layer.use_bias and not network.is_shared(name)]
    linear_means = network.compute_mean_linear_outputs(names)
    outputs = {name: _find_output(network.layers[name]) for name in names}
    inputs = {name: network.quantized.get_layer(name).input for name in names}
    expected_walk = Walk(network.calibration, network.float, [output for output, _ in outputs.values()])
    walk = Walk(network.calibration, network.quantized, [*inputs.values(), *network.quantized.outputs])
    for name in network.show_progress(names, "mean correction"):
        output, activation = outputs[name]
        expected = _take_samples(expected_walk.compute(output)).mean(axis=0)
        layer, kernel = network.quantized.get_layer(name), network.kernels[name].dequantize()
        linear = _compute_linear_samples(layer, walk.compute(inputs[name]), kernel)
        bias = linear_means[name] - linear.mean(axis=0)
        network.set_bias(name, bias if activation is None else find_biases(linear, bias, expected, activation))
    return network.compute_error([walk.compute(tensor) for tensor in network.quantized.outputs])


def find_biases(linear: np.ndarray, start: np.ndarray, expected: np.ndarray, activation: Callable) -> np.ndarray:
    """The bias of each channel with mean(activation(linear + bias)) = expected, or the nearest within two deviations.

    Args:
      linear: Linear outputs without bias, [samples, channels].
      start: Biases in the middle of the search, [channels].
      expected: Means to reach, [channels].
      activation: Function from a tensor to one of its shape, which never falls.

    Returns:
      Biases, [channels].

    Example:
      >>> import numpy as np
      >>> import tensorflow as tf
      >>> from tf_repvgg.quantization.ptq.methods.mean_correct import find_biases
      >>> find_biases(np.float32([[-1], [1]]), np.zeros(1), np.ones(1), tf.nn.relu).round(3).tolist()
      [1.0]
    """
    reach = _LARGEST_STEP * linear.std(axis=0)
    low, high = start - reach, start + reach
    for _ in range(_HALVINGS):
        bias = (low + high) / 2
        is_large = activation(tf.constant(linear + bias, tf.float32)).numpy().mean(axis=0) > expected
        low, high = np.where(is_large, low, bias), np.where(is_large, bias, high)
    return (low + high) / 2


def _find_output(layer: Any) -> tuple[Any, Callable | None]:
    """The tensor behind a layer's activation, of the layer itself or of the only layer that reads it, and that."""
    name = getattr(layer.activation, "__name__", "")
    if name in _RISING:
        return layer.output, layer.activation
    readers = [node.layer for node in layer.outbound_nodes]
    if name == "linear" and len(readers) == 1:
        (reader,) = readers
        is_rising = isinstance(reader, keras.layers.Activation) and reader.activation.__name__ in _RISING
        if is_rising or isinstance(reader, keras.layers.ReLU):
            return reader.output, reader
    return layer.output, None


def _compute_linear_samples(layer, inputs, kernel):
    """Some outputs without bias and activation, [samples, channels]."""
    batches = (inputs[start : start + _IMAGES_OF_A_BATCH] for start in range(0, len(inputs), _IMAGES_OF_A_BATCH))
    return np.concatenate([_take_samples(apply_kernel(layer, batch, kernel).numpy(), len(inputs)) for batch in batches])


def _take_samples(outputs, images=None):
    """Pixels of a batch [count, ..., channels], evenly spaced in each image: [samples, channels].

    Args:
      outputs: Values.
      images: Number of images of all batches together; by default the batch is all.
    """
    pixels = outputs.reshape(len(outputs), -1, outputs.shape[-1])
    stride = max(1, pixels.shape[1] * (images or len(outputs)) // _SAMPLES)
    while math.gcd(stride, pixels.shape[1]) > 1:  # so that all columns take part
        stride += 1
    return pixels[:, ::stride].reshape(-1, outputs.shape[-1])
