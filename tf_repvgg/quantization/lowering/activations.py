"""Activation functions made of operations that integer files compute; each function takes and gives Keras tensors."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.lowering.builder import Builder

# scale and alpha of keras.activations.selu (arXiv:1706.02515)
_SELU_SCALE, _SELU_ALPHA = 1.05070098, 1.67326324


def limit_relu(build: Builder, x: Any, name: str, limit: float) -> Any:
    """min(max(x, 0), limit), by way of ReLU6, which integer files have."""
    if limit == 6:
        return build.relu(x, name, 6.0)
    scaled = build.affine(x, f"{name}_to_6", 6 / limit)
    return build.affine(build.relu(scaled, f"{name}_relu6", 6.0), name, limit / 6)


def clip(build: Builder, x: Any, name: str, low: float | None, high: float | None) -> Any:
    """max(low, min(x, high)), where None is no limit."""
    if low is None:
        # high - relu(high - x)
        below = build.relu(build.affine(x, f"{name}_below", -1.0, high), f"{name}_relu")
        return build.affine(below, name, -1.0, high)
    if low:
        above = clip(build, build.affine(x, f"{name}_above", 1.0, -low), f"{name}_part", 0.0, high and high - low)
        return build.affine(above, name, 1.0, low)
    return build.relu(x, name) if high is None else limit_relu(build, x, name, high)


def hard_sigmoid(build: Builder, x: Any, name: str) -> Any:
    """min(max(0.2 x + 0.5, 0), 1)"""
    scaled = build.affine(x, f"{name}_to_6", 1.2, 3.0)
    return build.affine(build.relu(scaled, f"{name}_relu6", 6.0), name, 1 / 6)


def elu(build: Builder, x: Any, name: str, alpha: float = 1.0, scale: float = 1.0) -> Any:
    """scale * (relu(x) + alpha (exp(-relu(-x)) - 1))"""
    negative = build.affine(_relu_of_negative(build, x, name), f"{name}_exponent", -1.0)
    exponential = build.layer(keras.layers.Activation, negative, f"{name}_exp", activation="exponential")
    below = build.affine(exponential, f"{name}_below", scale * alpha, -scale * alpha)
    above = build.affine(build.relu(x, f"{name}_relu"), f"{name}_above", scale)
    return build.layer(keras.layers.Add, [above, below], name)


def selu(build: Builder, x: Any, name: str) -> Any:
    """elu with the two constants of self-normalizing networks"""
    return elu(build, x, name, _SELU_ALPHA, _SELU_SCALE)


def softplus(build: Builder, x: Any, name: str) -> Any:
    """relu(x) - log(sigmoid(|x|)), which is log(1 + exp(x))"""
    sigmoid = build.layer(keras.layers.Activation, tf.abs(x), f"{name}_sigmoid", activation="sigmoid")
    return build.layer(keras.layers.Subtract, [build.relu(x, f"{name}_relu"), tf.math.log(sigmoid)], name)


def mish(build: Builder, x: Any, name: str) -> Any:
    """x * tanh(softplus(x))"""
    gate = build.layer(
        keras.layers.Activation, softplus(build, x, f"{name}_softplus"), f"{name}_tanh", activation="tanh"
    )
    return build.layer(keras.layers.Multiply, [x, gate], name)


def leaky_relu(build: Builder, x: Any, name: str, slope: float, limit: float | None) -> Any:
    """x above 0 and slope * x below, at most `limit`"""
    if limit is None:
        return build.layer(keras.layers.LeakyReLU, x, name, alpha=slope)
    return clip(build, build.layer(keras.layers.LeakyReLU, x, f"{name}_slope", alpha=slope), name, None, limit)


def parametric_relu(build: Builder, x: Any, name: str, slope: Any) -> Any:
    """relu(x) - slope * relu(-x), with a slope of each channel"""
    below = build.affine(_relu_of_negative(build, x, name), f"{name}_below", -slope)
    return build.layer(keras.layers.Add, [build.relu(x, f"{name}_relu"), below], name)


def softsign(build: Builder, x: Any, name: str) -> Any:
    """x / (1 + |x|)"""
    return x / build.affine(tf.abs(x), f"{name}_divisor", 1.0, 1.0)


def _relu_of_negative(build, x, name):
    return build.relu(build.affine(x, f"{name}_negative", -1.0), f"{name}_negative_relu")


# Activations by the names of Keras that integer files have no operator for.
ACTIVATIONS: dict[str, Callable[[Builder, Any, str], Any]] = {
    "elu": elu,
    "hard_sigmoid": hard_sigmoid,
    "mish": mish,
    "selu": selu,
    "softplus": softplus,
    "softsign": softsign,
}
