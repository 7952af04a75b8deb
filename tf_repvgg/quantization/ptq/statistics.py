"""What normalizations tell of a fused network's activations without any data: distributions, channel by channel."""

import math
from typing import NamedTuple

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.network import Network, by_input_channel

# Of a range, on either side of the mean (arXiv:1906.04721, section 5); fewer where they are an upper bound.
_DEVIATIONS, _BOUNDS = 6, 2
_TINY = 1e-12
_FAR = 20.0  # deviations from the mean, beyond which a normal density is zero
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
    """What is known of a tensor's values, per channel: each of shape [channels]."""

    mean: np.ndarray
    deviation: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Prediction(NamedTuple):
    """Distributions all through a network.

    Attributes:
      inputs: {layer with weights: of its input}.
      linear: {layer with weights: of its output before the activation}.
      activations: {name of a quantizer: of what it is given}.
    """

    inputs: dict[str, Distribution]
    linear: dict[str, Distribution]
    activations: dict[str, Distribution]


def predict(network: Network, absorbed=None) -> Prediction:
    """Follows normal distributions through the float network as it is now.

    A fused block's output has the mean and variance that its normalizations imply, as `tf_repvgg.fusion.fuse` keeps
    them: the mean exactly; the variance, where branches add up, as if they were uncorrelated. A layer without
    normalization, such as a classifier's last, gets the mean from its inputs, and the standard deviation that it would
    have if they all varied together, an upper bound: features of one class do. ReLU clips the normal distribution
    (appendix C); a mean over pixels is as wide as a pixel is. The network's input is taken to be uniform.

    Args:
      absorbed: {layer: what absorption has taken from its bias}.

    Raises:
      ValueError: if the network holds a layer of a kind that distributions cannot be followed through; names it.
    """
    inputs, linear, activations, found = {}, {}, {}, {}
    low, high = network.options.input_range
    for tensor in network.float.inputs:
        ones = np.ones(tensor.shape[-1])
        found[str(id(tensor))] = Distribution(*(part * ones for part in _uniform(low, high)))
    for node in graph.nodes(network.float):
        layer, its = node.layer, [found[key] for key in node.flat_input_ids]
        if layer.name in network.layers:
            inputs[layer.name] = its[0]
            linear[layer.name] = _linear(network, layer, its[0], (absorbed or {}).get(layer.name, 0.0))
            output = _activated(linear[layer.name], layer, layer.activation.__name__)
        else:
            output = _passed(layer, its, node)
        if layer.name in network.quantizers:
            activations[layer.name] = output
        found.update(dict.fromkeys(node.flat_output_ids, output))
    return Prediction(inputs, linear, activations)


def clipped_normal(mean, deviation, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a normal variable clipped to [low, high] (arXiv:1906.04721, appendix C)."""
    deviation = np.maximum(deviation, _TINY)
    a, b = (np.clip((end - mean) / deviation, -_FAR, _FAR) for end in (low, high))
    # An end that is never reached contributes nothing, were it infinite.
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


def _normal(mean, deviation, count=_DEVIATIONS):
    return Distribution(mean, deviation, mean - count * deviation, mean + count * deviation)


def _linear(network, layer, its, absorbed):
    if (kept := network.statistics.get(layer.name)) is not None:
        divisor = network.divisors[layer.name]
        return _normal(kept.mean / divisor - absorbed, np.sqrt(kept.variance) / divisor)
    kernel = network.kernel(layer.name)
    mean, deviation = (by_input_channel(part, kernel.shape) for part in (its.mean, its.deviation))
    axes = tuple(range(kernel.ndim - 1))
    sums = np.sum(kernel * mean, axes) + network.bias(layer.name), np.sum(np.abs(kernel) * deviation, axes)
    return _normal(*sums, _BOUNDS)


def _activated(its, layer, activation):
    ends = {"linear": (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}.get(activation)
    if ends is None:
        if activation in ("sigmoid", "softmax", "tanh"):  # ranges that TFLite prescribes
            return Distribution(*(part * np.ones_like(its.mean) for part in _uniform(-1.0, 1.0)))
        raise _unknown(layer, f"activation {activation!r}")
    if activation == "linear":
        return its
    return Distribution(*clipped_normal(*its[:2], *ends), np.clip(its.low, *ends), np.clip(its.high, *ends))


def _passed(layer, its, node):
    if isinstance(layer, keras.layers.Activation):
        return _activated(its[0], layer, layer.activation.__name__)
    if isinstance(layer, keras.layers.ReLU) and not np.any(layer.negative_slope) and not np.any(layer.threshold):
        if layer.max_value in (None, 6.0):
            return _activated(its[0], layer, "relu" if layer.max_value is None else "relu6")
    elif isinstance(layer, _UNCHANGED):
        return its[0]
    elif isinstance(layer, _MEANS):
        wide = _normal(its[0].mean, its[0].deviation)
        return wide._replace(low=np.maximum(wide.low, its[0].low), high=np.minimum(wide.high, its[0].high))
    elif isinstance(layer, keras.layers.Flatten):
        count = int(np.prod(node.input_shapes[1:]))
        return Distribution(*(np.tile(part, count // len(part)) for part in its[0]))
    elif isinstance(layer, keras.layers.Add):
        return _normal(sum(one.mean for one in its), np.sqrt(sum(np.square(one.deviation) for one in its)))
    raise _unknown(layer, type(layer).__name__)


def _unknown(layer, what):
    return ValueError(
        f"layer {layer.name!r}: distributions cannot be followed through {what} without data; use a method with "
        "calibration images, such as dfq"
    )
