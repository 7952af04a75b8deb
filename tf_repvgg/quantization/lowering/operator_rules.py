"""Operators on tensors, such as x * 2 and tf.nn.relu(x), as layers that integer files have."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.lowering import activations
from tf_repvgg.quantization.lowering.affine import spread_constant
from tf_repvgg.quantization.lowering.builder import Builder


def is_operator(layer: keras.layers.Layer) -> bool:
    """Whether Keras made a layer of a call of a TensorFlow function."""
    return hasattr(layer, "symbol") and hasattr(layer, "function")


def find_replacement(layer: keras.layers.Layer, build: Builder) -> Callable[..., Any] | None:
    """Makes what takes the place of an operator; None if the operator stays.

    Args:
      layer: Layer that Keras made of a call of a TensorFlow function.
      build: Builder for this layer.

    Returns:
      A callable with the arguments of the operator's calls, which returns None for a call that stays as it is.
    """
    rule = _RULES.get(layer.symbol)
    if rule is None:
        return None
    signature = inspect.signature(layer.function)

    def call(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        return rule(build, *(value for name, value in bound.arguments.items() if name != "name"))

    return call


def _is_tensor(value):
    return tf.is_tensor(value) and keras.backend.is_keras_tensor(value)


def _add_constant(build, first, second, sign):
    """x + c, x - c or c - x with a constant, where `sign` is that of the second operand."""
    if _is_tensor(first) and _is_tensor(second):
        return None
    is_second = _is_tensor(second)
    x, value = (second, first) if is_second else (first, second)
    constant = _spread(value, x)
    if constant is None:
        return None
    return (
        build.affine(x, build.owner, sign, constant) if is_second else build.affine(x, build.owner, 1, sign * constant)
    )


def _add(build, first, second):
    return _add_constant(build, first, second, 1.0)


def _subtract(build, first, second):
    return _add_constant(build, first, second, -1.0)


def _multiply(build, first, second):
    if _is_tensor(first) and _is_tensor(second):
        same_rank = len(first.shape) == len(second.shape)
        return build.layer(keras.layers.Multiply, [first, second], build.owner) if same_rank else None
    x, value = (first, second) if _is_tensor(first) else (second, first)
    constant = _spread(value, x)
    return None if constant is None else build.affine(x, build.owner, constant)


def _divide(build, numerator, denominator):
    if _is_tensor(denominator):
        return None
    constant = _spread(denominator, numerator)
    return None if constant is None or not np.all(constant) else build.affine(numerator, build.owner, 1 / constant)


def _negate(build, x):
    return build.affine(x, build.owner, -1.0)


def _add_bias(build, x, bias, data_format=None):
    return None if (data_format or "NHWC")[:2] == "NC" and len(x.shape) > 2 else _add(build, x, bias)


def _add_all(build, tensors):
    return (
        build.chain(keras.layers.Add, tensors, build.owner)
        if len(tensors) > 1 and all(map(_is_tensor, tensors))
        else None
    )


def _concatenate(build, tensors, axis):
    """The layer, whose inputs are rounded on the grid of its output."""
    if len(tensors) < 2 or not all(map(_is_tensor, tensors)):
        return None
    return build.layer(keras.layers.Concatenate, tensors, build.owner, axis=int(axis))


def _square(build, x):
    return build.layer(keras.layers.Multiply, [x, x], build.owner)


def _power(build, x, exponent):
    return _square(build, x) if _is_tensor(x) and _number(exponent) == 2 else None


def _maximum(build, first, second):
    x, value = (first, second) if _is_tensor(first) else (second, first)
    limit = _number(value)
    return None if limit is None else activations.clip(build, x, build.owner, limit, None)


def _minimum(build, first, second):
    x, value = (first, second) if _is_tensor(first) else (second, first)
    limit = _number(value)
    return None if limit is None else activations.clip(build, x, build.owner, None, limit)


def _clip(build, x, low, high):
    limits = _number(low), _number(high)
    return None if None in limits or limits[0] >= limits[1] else activations.clip(build, x, build.owner, *limits)


def _softmax(build, x, axis=-1):
    last = axis is None or axis in (-1, len(x.shape) - 1)
    return build.layer(keras.layers.Softmax, x, build.owner) if last else None


def _leaky_relu(build, x, alpha=0.2):
    return build.layer(keras.layers.LeakyReLU, x, build.owner, alpha=float(alpha))


def _cast(build, x, dtype):
    """Nothing, once the model's input is float instead of the type that was cast."""
    return x if tf.as_dtype(dtype) == x.dtype == tf.float32 else None


def _matrix_product(build, x, matrix, *flags):
    is_plain = not any(np.any(flag) for flag in flags)
    return _dense(build, x, matrix) if is_plain else None


def _tensor_product(build, x, matrix, axes):
    return _dense(build, x, matrix) if np.ndim(axes) == 0 and _number(axes) == 1 else None


def _einsum(build, equation, operands):
    """A product like "bc,cd->bd"."""
    if len(operands) != 2:
        return None
    left, _, rest = equation.replace(" ", "").partition(",")
    right, _, result = rest.partition("->")
    contracts = len(right) == 2 and right[0] == left[-1:] and right[1] not in left and result == left[:-1] + right[1]
    return _dense(build, *operands) if contracts and len(set(left)) == len(left) else None


def _dense(build, x, matrix):
    if not _is_tensor(x) or _is_tensor(matrix):
        return None
    kernel = np.asarray(matrix, np.float32)
    if kernel.ndim != 2 or len(x.shape) < 2:
        return None
    config = {"use_bias": False, "name": build.claim(build.owner)}
    if len(x.shape) == 4:  # a convolution, as layer_rules makes of a dense layer on a map of features
        layer, kernel = keras.layers.Conv2D(kernel.shape[1], 1, **config), kernel[np.newaxis, np.newaxis]
    else:
        layer = keras.layers.Dense(kernel.shape[1], **config)
    outputs = layer(x)
    layer.set_weights([kernel])
    return outputs


def _spread(value, x):
    is_float = x.dtype.is_floating
    return spread_constant(value, x.shape) if is_float else None


def _number(value):
    """A constant as a number; None if it is a tensor or has several elements."""
    if _is_tensor(value) or np.size(value) != 1:
        return None
    return float(np.asarray(value).reshape(()))


def _activate(name):
    return lambda build, x: build.layer(keras.layers.Activation, x, build.owner, activation=name)


def _decompose(name):
    return lambda build, x: activations.ACTIVATIONS[name](build, x, build.owner)


# Rules by the names under which TensorFlow exports the functions.
_RULES: dict[str, Callable[..., Any]] = {
    "__operators__.add": _add,
    "cast": _cast,
    "clip_by_value": _clip,
    "concat": _concatenate,
    "einsum": _einsum,
    "linalg.matmul": _matrix_product,
    "math.add": _add,
    "math.add_n": _add_all,
    "math.divide": _divide,
    "math.maximum": _maximum,
    "math.minimum": _minimum,
    "math.multiply": _multiply,
    "math.negative": _negate,
    "math.pow": _power,
    "math.sigmoid": _activate("sigmoid"),
    "math.softplus": _decompose("softplus"),
    "math.square": _square,
    "math.subtract": _subtract,
    "math.tanh": _activate("tanh"),
    "math.truediv": _divide,
    "nn.bias_add": _add_bias,
    "nn.elu": _decompose("elu"),
    "nn.leaky_relu": _leaky_relu,
    "nn.relu": lambda build, x: build.relu(x, build.owner),
    "nn.relu6": lambda build, x: build.relu(x, build.owner, 6.0),
    "nn.selu": _decompose("selu"),
    "nn.softmax": _softmax,
    "nn.softsign": _decompose("softsign"),
    "tensordot": _tensor_product,
}
