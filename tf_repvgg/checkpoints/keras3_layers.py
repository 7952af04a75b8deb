"""Layers, activations and operations of Keras 3, and what computes the same in Keras 2.

Only what these tables name is ever built, whatever a file asks for. An argument that Keras 2 lacks is refused unless it
has the value that changes nothing.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

# One layer, or one operation: "Conv2D", its configuration, and where its calls go.
Record = Mapping[str, Any]

# Settings of training that do not change what a trained layer computes.
_TRAINING_ARGUMENTS = ("_initializer", "_regularizer", "_constraint")
# Weights are read as float32, and so is everything computed: exactly what 32 bits do, and more than 16 bits do.
_FLOAT_POLICIES = ("float32", "float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a layer of Keras 3 is made in Keras 2.

    Attributes:
      layer_class: Class in Keras 2.
      renames: {argument in Keras 3: argument in Keras 2}.
      without_effect: {argument that Keras 2 lacks: values that change nothing}.
    """

    layer_class: type[keras.layers.Layer]
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without_effect: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """Arguments of the class in Keras 2."""
        return frozenset(inspect.signature(self.layer_class).parameters) | {"name", "trainable"}


_PLAIN_LAYERS = (
    *("Activation", "ELU", "PReLU", "ReLU", "Softmax"),
    *("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"),
    *("Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "DepthwiseConv1D", "DepthwiseConv2D"),
    *("SeparableConv1D", "SeparableConv2D", "Normalization", "Rescaling"),
    *("AveragePooling1D", "AveragePooling2D", "MaxPooling1D", "MaxPooling2D", "GlobalAveragePooling2D"),
    *("GlobalMaxPooling1D", "GlobalMaxPooling2D", "UpSampling1D", "UpSampling2D"),
    *("Cropping1D", "Cropping2D", "ZeroPadding2D", "Flatten", "Permute", "Reshape", "Identity"),
    *("ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"),
)
_LAYERS = {
    **{name: _Rule(getattr(keras.layers, name)) for name in _PLAIN_LAYERS},
    "BatchNormalization": _Rule(
        keras.layers.BatchNormalization,
        without_effect={"renorm": (False,), "renorm_clipping": (None,), "renorm_momentum": (0.99,)},
    ),
    "Dense": _Rule(keras.layers.Dense, without_effect={"quantization_config": (None,)}),
    "GlobalAveragePooling1D": _Rule(keras.layers.GlobalAveragePooling1D, without_effect={"keepdims": (False,)}),
    "LeakyReLU": _Rule(keras.layers.LeakyReLU, renames={"negative_slope": "alpha"}),
    "SpatialDropout1D": _Rule(keras.layers.SpatialDropout1D),
    "SpatialDropout2D": _Rule(keras.layers.SpatialDropout2D),
    "ZeroPadding1D": _Rule(keras.layers.ZeroPadding1D, without_effect={"data_format": ("channels_last",)}),
}
# Of training alone: outside it, they return their inputs.
_AUGMENTATIONS = (
    *("RandomBrightness", "RandomContrast", "RandomFlip", "RandomGrayscale", "RandomHue", "RandomRotation"),
    *("RandomSaturation", "RandomShear", "RandomTranslation", "RandomZoom", "RandomErasing", "RandomColorJitter"),
)

# {activation in Keras 3: name of the same function in Keras 2}
_ACTIVATIONS = {
    **{name: name for name in ("elu", "exponential", "gelu", "leaky_relu", "linear", "mish", "relu", "relu6", "selu")},
    **{name: name for name in ("sigmoid", "softmax", "softplus", "softsign", "tanh")},
    "silu": "swish",
    "swish": "swish",
}
_ACTIVATION_LAYERS = ("Activation", "ELU", "LeakyReLU", "ReLU", "Softmax")


def is_operation(record: Record) -> bool:
    """Whether a record is of an operation on tensors; Keras 3 does not count it among the layers."""
    return str(record.get("module")).startswith(("keras.src.ops", "keras.ops", "keras.src.activations"))


def is_augmentation(record: Record) -> bool:
    """Whether a record is of a layer that changes images in training only."""
    return record["class_name"] in _AUGMENTATIONS


def make_layer(record: Record) -> "keras.layers.Layer | Chain":
    """Makes a layer of Keras 2 that computes what a layer of Keras 3 computes.

    Args:
      record: The layer as Keras 3 describes it in config.json.

    Returns:
      The layer, or a chain where one layer of Keras 2 is not enough.

    Raises:
      ValueError: If no layer of Keras 2 computes the same, or the configuration is damaged. The message does not name
        the layer.
    """
    name = record["class_name"]
    if is_augmentation(record):
        return Chain(None, [])
    if name not in _LAYERS:
        raise ValueError(
            "it holds code of its own, which is never run; replace it by layers of Keras"
            if name == "Lambda"
            else "layers of this class are not among those that are rebuilt"
        )
    rule, config = _LAYERS[name], record["config"]
    arguments, tail = {}, []
    for key, value in config.items():
        if key == "activation":
            arguments[key], tail = _translate_activation(value, config["name"])
        elif key == "dtype":
            _check_dtype(value)
        elif not key.endswith(_TRAINING_ARGUMENTS):
            arguments |= _translate_argument(rule, key, value)
    if arguments.get("data_format", "channels_last") != "channels_last":
        raise ValueError("its data_format is channels_first; build the network with channels_last")
    layer = rule.layer_class(**arguments)
    return Chain(layer, tail) if tail else layer


class Chain:
    """A layer, or none, and functions after it.

    Args:
      layer: Layer that may have weights, or None.
      tail: Functions of tensors, without weights.
    """

    def __init__(self, layer: keras.layers.Layer | None, tail: Sequence[Callable[..., Any]]) -> None:
        self.layer = layer
        self._tail = tail

    def __call__(self, inputs: Any) -> Any:
        outputs = inputs if self.layer is None else self.layer(inputs)
        for function in self._tail:
            outputs = function(outputs)
        return outputs


def _translate_argument(rule, key, value):
    """{argument in Keras 2: value}; empty for one that changes nothing."""
    if key == "seed":  # of training alone
        return {}
    if key in rule.without_effect:
        if value not in rule.without_effect[key]:
            raise ValueError(f"its {key}={value!r} has no counterpart in Keras 2")
        return {}
    name = rule.renames.get(key, key)
    if name not in rule.arguments:
        raise ValueError(f"its argument {key}={value!r} has no counterpart in Keras 2")
    return {name: read_constant(value)}


def _check_dtype(value):
    name = value["config"].get("name", value["class_name"]) if isinstance(value, Mapping) else value
    if name not in _FLOAT_POLICIES:
        raise ValueError(f"it computes in {name!r}; known: {', '.join(_FLOAT_POLICIES)}")


def read_constant(value: Any) -> Any:
    """A number, text, or nested list of them in config.json, as layers take it.

    Raises:
      ValueError: If it is something else, such as an object of a class.
    """
    if isinstance(value, list):
        return tuple(map(read_constant, value))
    if isinstance(value, Mapping) and value.get("class_name") in ("__numpy__", "__tensor__"):
        dtype = np.dtype(value["config"]["dtype"])
        if dtype.kind not in "fiub":
            raise ValueError(f"it has a constant of type {dtype}")
        return np.asarray(value["config"]["value"], dtype)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"it has an argument of the class {_class_of(value)!r}, which cannot be read")


def _class_of(value):
    return value.get("class_name") if isinstance(value, Mapping) else type(value).__name__


def _translate_activation(value, name):
    """The activation as Keras 2 knows it, and layers to follow where Keras 2 has no such function."""
    if isinstance(value, Mapping):
        if value.get("class_name") in _ACTIVATION_LAYERS:
            record = {**value, "config": {**value["config"], "name": f"{name}_activation"}}
            return "linear", [make_layer(record)]
        is_function = value.get("class_name") == "function" and str(value.get("module")).startswith("keras.")
        value = value.get("config") if is_function else _class_of(value)
    if value is None:
        value = "linear"
    if value in _ACTIVATIONS:
        return _ACTIVATIONS[value], []
    if value in _COMPOSED_ACTIVATIONS:
        return "linear", [functools.partial(_COMPOSED_ACTIVATIONS[value], name=name)]
    raise ValueError(
        f"its activation {value!r} cannot be read; known: {', '.join(sorted({*_ACTIVATIONS, *_COMPOSED_ACTIVATIONS}))}"
    )


def _hard_sigmoid(x, name):
    """relu6(x + 3) / 6, which the function of that name in Keras 2 is not."""
    moved = keras.layers.Rescaling(1.0, 3.0, name=f"{name}_plus_3")(x)
    return keras.layers.Rescaling(1 / 6, name=f"{name}_hard_sigmoid")(
        keras.layers.ReLU(6.0, name=f"{name}_relu6")(moved)
    )


def _hard_silu(x, name):
    return keras.layers.Multiply(name=f"{name}_hard_silu")([x, _hard_sigmoid(x, name)])


_COMPOSED_ACTIVATIONS = {"hard_sigmoid": _hard_sigmoid, "hard_silu": _hard_silu, "hard_swish": _hard_silu}


def make_operation(record: Record) -> Callable[..., Any]:
    """Makes a function of tensors for an operation of keras.ops, which `x + y` is too.

    Args:
      record: The operation as Keras 3 describes it in config.json.

    Raises:
      ValueError: If the operation is none of those known, or has other arguments. The message does not name it.
    """
    name = record["class_name"]
    if name not in _OPERATIONS:
        raise ValueError("this operation is not among those that are rebuilt: " + ", ".join(_OPERATIONS))
    options = {key: read_constant(value) for key, value in record["config"].items() if key not in ("name", "dtype")}
    return functools.partial(_OPERATIONS[name], record["config"]["name"], **options)


def _mean(name, x, axis, keepdims=False):
    axes = {axis} if isinstance(axis, int) else set(axis or ())
    if len(x.shape) != 4 or {number % 4 for number in axes} != {1, 2}:
        raise ValueError(f"it takes the mean over the axes {axis}; known: those of height and width")
    return keras.layers.GlobalAveragePooling2D(keepdims=keepdims, name=name)(x)


def _reshape(name, x, newshape):
    if newshape[0] not in (-1, None):
        raise ValueError(f"its shape {newshape} does not leave the batch open")
    return keras.layers.Reshape(newshape[1:], name=name)(x)


def _activate(activation):
    def call(name, x):
        argument, tail = _translate_activation(activation, name)
        outputs = x if tail else keras.layers.Activation(argument, name=name)(x)
        return tail[0](outputs) if tail else outputs

    return call


def _gelu(name, x, approximate=True):
    if approximate:
        raise ValueError("its approximate=True cannot be read; use the exact function, approximate=False")
    return keras.layers.Activation("gelu", name=name)(x)


def _relu(name, x, negative_slope=0.0, max_value=None, threshold=0.0):
    return keras.layers.ReLU(max_value, negative_slope, threshold, name=name)(x)


def _softmax(name, x, axis=-1):
    return keras.layers.Softmax(axis, name=name)(x)


def _leaky_relu(name, x, negative_slope=0.2):
    return keras.layers.LeakyReLU(negative_slope, name=name)(x)


def _concatenate(name, tensors, axis=0):
    return keras.layers.Concatenate(axis, name=name)(list(tensors))


def _clip(name, x, x_min, x_max):
    return tf.clip_by_value(x, x_min, x_max)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda name, first, second: first + second,
    "Clip": _clip,
    "Concatenate": _concatenate,
    "Divide": lambda name, first, second: first / second,
    "Gelu": _gelu,
    "LeakyRelu": _leaky_relu,
    "Maximum": lambda name, first, second: tf.maximum(first, second),
    "Mean": _mean,
    "Minimum": lambda name, first, second: tf.minimum(first, second),
    "Multiply": lambda name, first, second: first * second,
    "ReLU": _relu,
    "Negative": lambda name, x: -x,
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Square": lambda name, x: tf.square(x),
    "Subtract": lambda name, first, second: first - second,
    "TrueDivide": lambda name, first, second: first / second,
    **{
        name: _activate(activation)
        for name, activation in {
            "HardSigmoid": "hard_sigmoid",
            "HardSilu": "hard_silu",
            "Relu": "relu",
            "Relu6": "relu6",
            "Sigmoid": "sigmoid",
            "Silu": "silu",
            "Tanh": "tanh",
        }.items()
    },
}
