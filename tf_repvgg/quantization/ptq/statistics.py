"""Distributions of a fused network's activations, channel by channel, from its normalizations and without any data."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import relu_name
from tf_repvgg.quantization.input_scale import LARGEST_INPUT
from tf_repvgg.quantization.ptq.network import Network, spread_over_kernel

# Standard deviations on either side of the mean that a range holds (arXiv:1906.04721, section 5); fewer where the
# standard deviation is an upper bound.
_RANGE, _RANGE_OF_UPPER_BOUND = 6, 2
_TINY = 1e-12
_FAR = 20.0  # standard deviations from the mean beyond which a normal density is zero
# Layers that leave the distribution as it is.
_UNCHANGED = (
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.GaussianNoise,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling2D,
    keras.layers.SpatialDropout2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)
_MEANS = (keras.layers.AveragePooling2D, keras.layers.GlobalAveragePooling2D)


class Distribution(NamedTuple):
    """Distribution of a tensor's values, per channel.

    Attributes:
      mean: Mean, [channels].
      deviation: Standard deviation, [channels].
      low: Lower end of the range, [channels].
      high: Upper end of the range, [channels].
    """

    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Prediction(NamedTuple):
    """Distributions all through a network.

    Attributes:
      inputs: {name of a layer with weights: distribution of its input}.
      linear: {name of a layer with weights: distribution of its output before the activation}.
      activations: {name of a quantizer: distribution of its input}.
    """

    inputs: dict[str, Distribution]
    linear: dict[str, Distribution]
    activations: dict[str, Distribution]


def predict(network: Network, absorbed: Mapping[str, np.ndarray] | None = None) -> Prediction:
    """Follows normal distributions through the float network as it is now.

    The output of a fused block has the mean and variance that its normalizations imply, as `tf_repvgg.fusion.fuse`
    stores them: the mean exactly; the variance, where branches add up, as if they were uncorrelated. A layer without
    normalization, such as a classifier's last, gets the mean from its inputs, and the standard deviation that it would
    have if they all varied together, an upper bound: features of one class do. ReLU clips the normal distribution
    (appendix C of arXiv:1906.04721); a mean over pixels is taken to vary as much as one pixel. The network's input is
    taken to be uniform.

    Args:
      network: Network with statistics.
      absorbed: {layer name: amount [output channels] that absorption has taken from its bias}.

    Raises:
      ValueError: If the network holds a layer of a kind that distributions cannot be followed through; names it. Or if
        images are pixels: without images, nothing shows whether the network takes them.
    """
    absorbed = absorbed or {}
    low, high = network.options.input_range
    if max(-low, high) > LARGEST_INPUT:
        raise ValueError(f"images are from {low:g} to {high:g}, but methods without images need normalized ones")
    inputs, linear, activations = {}, {}, {}
    distributions = {}  # by the graph's key of the tensor
    for tensor in network.float.inputs:
        ones = np.ones(tensor.shape[-1])
        distributions[str(id(tensor))] = Distribution(*(value * ones for value in _uniform(low, high)))
    for node in graph.nodes(network.float):
        layer, arguments = node.layer, [distributions[key] for key in node.flat_input_ids]
        if layer.name in network.layers:
            inputs[layer.name] = arguments[0]
            linear[layer.name] = _predict_linear(network, layer, arguments[0], absorbed.get(layer.name, 0.0))
            output = _activate(linear[layer.name], layer, layer.activation.__name__)
        else:
            output = _pass_through(layer, arguments, node)
        if layer.name in network.quantizers:
            activations[layer.name] = output
        distributions.update(dict.fromkeys(node.flat_output_ids, output))
    return Prediction(inputs, linear, activations)


def clip_normal(mean: Any, deviation: Any, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a normal variable clipped to [low, high] (arXiv:1906.04721, appendix C).

    Args:
      mean: Mean of the variable, a number or an array.
      deviation: Standard deviation of the variable, a number or an array.
      low: Lower end, which may be minus infinity.
      high: Upper end, which may be infinity.
    """
    deviation = np.maximum(deviation, _TINY)
    a, b = (np.clip((end - mean) / deviation, -_FAR, _FAR) for end in (low, high))
    # An end that is never reached contributes nothing, even if it is infinite.
    low, high = (end if np.isfinite(end) else 0.0 for end in (low, high))
    below, above, between = _cumulative(a), 1 - _cumulative(b), _cumulative(b) - _cumulative(a)
    first = deviation * (_density(a) - _density(b)) + mean * between + low * below + high * above
    second = (
        (mean**2 + deviation**2) * between
        + deviation * ((mean + low) * _density(a) - (mean + high) * _density(b))
        + low**2 * below
        + high**2 * above
    )
    return first, np.sqrt(np.maximum(second - first**2, 0))


def _density(x):
    return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)


def _cumulative(x):
    return (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2))) / 2


def _uniform(low, high):
    return (low + high) / 2, (high - low) / math.sqrt(12), low, high


def _normal(mean, deviation, count=_RANGE):
    return Distribution(mean, deviation, mean - count * deviation, mean + count * deviation)


def _predict_linear(network, layer, distribution, absorbed):
    """Distribution of a layer's output before the activation."""
    if (statistics := network.statistics.get(layer.name)) is not None:
        divisor = network.divisors[layer.name]
        return _normal(statistics.mean / divisor - absorbed, np.sqrt(statistics.variance) / divisor)
    if isinstance(layer, keras.layers.Conv2DTranspose):
        # Its pixels have different distributions, as they read different numbers of pixels.
        raise _unknown_kind(layer, type(layer).__name__)
    kernel = network.kernel(layer.name)
    mean, deviation = (
        spread_over_kernel(values, kernel.shape) for values in (distribution.mean, distribution.deviation)
    )
    axes = tuple(range(kernel.ndim - 1))
    sums = np.sum(kernel * mean, axes) + network.bias(layer.name), np.sum(np.abs(kernel) * deviation, axes)
    return _normal(*sums, _RANGE_OF_UPPER_BOUND)


def _activate(distribution, layer, activation):
    ends = {"linear": (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}.get(activation)
    if ends is None:
        if activation in ("sigmoid", "softmax", "tanh"):  # TFLite prescribes their ranges
            return Distribution(*(value * np.ones_like(distribution.mean) for value in _uniform(-1.0, 1.0)))
        raise _unknown_kind(layer, f"activation {activation!r}")
    if activation == "linear":
        return distribution
    mean, deviation = clip_normal(distribution.mean, distribution.deviation, *ends)
    return Distribution(mean, deviation, np.clip(distribution.low, *ends), np.clip(distribution.high, *ends))


def _pass_through(layer, inputs, node):
    """Distribution of the output of a layer without weights."""
    first = inputs[0]
    if isinstance(layer, keras.layers.Activation):
        return _activate(first, layer, layer.activation.__name__)
    if isinstance(layer, keras.layers.ReLU):
        if (activation := relu_name(layer)) is not None:
            return _activate(first, layer, activation)
    elif isinstance(layer, _UNCHANGED):
        return first
    elif isinstance(layer, _MEANS):
        normal = _normal(first.mean, first.deviation)
        return normal._replace(low=np.maximum(normal.low, first.low), high=np.minimum(normal.high, first.high))
    elif isinstance(layer, keras.layers.Flatten):
        count = int(np.prod(node.input_shapes[1:]))
        return Distribution(*(np.tile(values, count // len(values)) for values in first))
    elif isinstance(layer, keras.layers.Add):
        variance = sum(np.square(term.deviation) for term in inputs)
        return _normal(sum(term.mean for term in inputs), np.sqrt(variance))
    raise _unknown_kind(layer, type(layer).__name__)


def _unknown_kind(layer, kind):
    return ValueError(
        f"layer {layer.name!r}: distributions cannot be followed through {kind} without data; use a method with "
        "calibration images, such as dfq"
    )
