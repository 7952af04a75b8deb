"""The heads of random models: each is a function from a source of decisions, a feature map and a name to an output."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from harness.any_model.drawing import Drawing

Head = Callable[[Drawing, Any, str], Any]
L = keras.layers

_CLASSES = 4


def _pool(draw, x):
    return (L.GlobalAveragePooling2D() if draw.decide(0.7) else L.GlobalMaxPooling2D())(x)


def _add_dense(draw, x, name):
    activation = draw.choose([None, None, "softmax", "sigmoid"])
    return L.Dense(_CLASSES, name=name, activation=activation)(_pool(draw, x))


def _add_two_dense(draw, x, name):
    hidden = L.Dense(6, activation=draw.choose_activation())(_pool(draw, x))
    return L.Dense(_CLASSES, name=name)(L.Dropout(0.5)(hidden))


def _add_operators(draw, x, name):
    return L.Dense(_CLASSES, name=name)(_pool(draw, x)) * 3.0 + draw.choose([0.0, 2.0])


def _add_sequence(draw, x, name):
    y = L.Reshape((x.shape[1] * x.shape[2], x.shape[3]))(x)
    y = L.GlobalAveragePooling1D()(L.Conv1D(5, 3, padding="same", activation="relu")(y))
    return L.Dense(_CLASSES, name=name)(y)


def _add_rows(draw, x, name):
    y = L.Reshape((x.shape[1], x.shape[2] * x.shape[3]))(x)
    return L.GlobalAveragePooling1D(name=name)(L.TimeDistributed(L.Dense(_CLASSES))(y))


def _add_einsum(draw, x, name):
    y = _pool(draw, x)
    return tf.einsum("bc,cd->bd", y, draw.draw_matrix(y.shape[-1], _CLASSES))


def _add_matmul(draw, x, name):
    y = _pool(draw, x)
    return tf.matmul(y, draw.draw_matrix(y.shape[-1], _CLASSES))


HEADS: dict[str, Head] = {
    "conv1d": _add_sequence,
    "dense": _add_dense,
    "dense and operators": _add_operators,
    "einsum": _add_einsum,
    "flatten and dense": lambda draw, x, name: L.Dense(_CLASSES, name=name)(L.Flatten()(x)),
    "map": lambda draw, x, name: L.Conv2D(3, 1, name=name)(x),
    "matmul": _add_matmul,
    "softmax layer": lambda draw, x, name: L.Softmax(name=name)(L.Dense(_CLASSES)(_pool(draw, x))),
    "time distributed": _add_rows,
    "two dense": _add_two_dense,
}
