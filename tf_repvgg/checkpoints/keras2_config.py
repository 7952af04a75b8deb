"""Configurations of models of Keras 2: every class and function that one names must be on a list.

Keras builds any class that a configuration names, imports modules for it, and calls functions by name. So everything in
a configuration is looked at before Keras sees it: layers, nested models, what wrappers wrap, initializers,
regularizers, constraints, activations, functions of TensorFlow, and classes registered under other names.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg.checkpoints.tensorflow_functions import FUNCTIONS

# One class, its configuration, and in a model its calls.
Record = dict[str, Any]

MODELS = ("Functional", "Model", "Sequential")
_ACTIVATION_LAYERS = ("ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax", "ThresholdedReLU")
# Not among them are: Lambda and layers that read files (StringLookup), keep arrays between calls (LSTM), or call any
# operator or method by name (TensorFlowOpLayer, ClassMethod, InstanceMethod).
_LAYERS = (
    *_ACTIVATION_LAYERS,
    *("Activation", "ActivityRegularization", "Add", "AdditiveAttention", "AlphaDropout", "Attention", "Average"),
    *("AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "BatchNormalization", "BatchNormalizationV1"),
    *("BatchNormalizationV2", "CenterCrop", "Concatenate", "Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose"),
    *("Conv3D", "Conv3DTranspose", "Cropping1D", "Cropping2D", "Cropping3D", "Dense", "DepthwiseConv1D"),
    *("DepthwiseConv2D", "Dot", "Dropout", "EinsumDense", "Embedding", "Flatten", "GaussianDropout", "GaussianNoise"),
    *("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "GlobalMaxPooling1D"),
    *("GlobalMaxPooling2D", "GlobalMaxPooling3D", "GroupNormalization", "Identity", "InputLayer"),
    *("LayerNormalization", "Masking", "MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "Maximum", "Minimum"),
    *("MultiHeadAttention", "Multiply", "Normalization", "Permute", "RandomBrightness", "RandomContrast"),
    *("RandomCrop", "RandomFlip", "RandomHeight", "RandomRotation", "RandomTranslation", "RandomWidth", "RandomZoom"),
    *("RepeatVector", "Rescaling", "Reshape", "Resizing", "SeparableConv1D", "SeparableConv2D", "SlicingOpLambda"),
    *("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "SpectralNormalization", "Subtract"),
    *("SyncBatchNormalization", "TFOpLambda", "TimeDistributed", "UnitNormalization", "UpSampling1D"),
    *("UpSampling2D", "UpSampling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D"),
)
_INITIALIZERS = (
    *("Constant", "GlorotNormal", "GlorotUniform", "HeNormal", "HeUniform", "Identity", "LecunNormal", "LecunUniform"),
    *("Ones", "Orthogonal", "RandomNormal", "RandomUniform", "TruncatedNormal", "VarianceScaling", "Zeros"),
)
_REGULARIZERS = ("L1", "L1L2", "L2", "OrthogonalRegularizer")
_CONSTRAINTS = ("MaxNorm", "MinMaxNorm", "NonNeg", "RadialConstraint", "UnitNorm")
_CLASSES = frozenset((*MODELS, *_LAYERS, *_INITIALIZERS, *_REGULARIZERS, *_CONSTRAINTS, "Policy"))
# What Keras looks up below these modules under the names above is its own.
_MODULE_OF_KERAS = re.compile(
    r"(tf_)?keras(\.src)?(\.(activations|constraints|engine|initializers|layers|mixed_precision|models|regularizers)"
    r"(\.[a-z0-9_]+)*)?"
)
_MODULE_OF_FUNCTIONS = re.compile(r"builtins|(tf_)?keras(\.src)?\.activations")
_MODULE_OF_INITIALIZERS = re.compile(r"tensorflow\.python\.ops\.init_ops(_v2)?")
# Packages whose classes are known by the names under which they register them.
_REGISTERING_PACKAGES = ("tf_repvgg.", "tf_keras.src.applications.")
_MODULE_OF_REGISTERED_CLASSES = re.compile(r"(tf_repvgg|(tf_)?keras(\.src)?\.applications)(\.[a-z0-9_]+)*")

_ACTIVATIONS = (
    *("elu", "exponential", "gelu", "hard_sigmoid", "linear", "mish", "relu", "selu", "sigmoid", "silu", "softmax"),
    *("softplus", "softsign", "swish", "tanh"),
)
_NUMBERS = re.compile(r"bool|(u?int|float|bfloat|complex)[0-9]{1,3}")
# Records of values, not of classes.
_ARRAYS, _VALUES = ("__numpy__", "__tensor__"), ("__bytes__", "__ellipsis__", "__tuple__", "TensorShape")
# Keras takes a list that starts with this for a type of tensors in JSON of its own.
_ENCODED_TYPE = "_COMPOSITE_TYPE"


def _add_lower_case(names):
    """Classes by name, and the functions of the same name: "HeNormal" and "he_normal"."""
    return {*names, *(re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower() for name in names)}


# {end of an argument's name: the text that it may hold}. Keras takes this text for the name of a function or class.
_NAMES_IN_ARGUMENTS: dict[str, Collection[str]] = {
    "activation": {*_ACTIVATIONS, *_ACTIVATION_LAYERS},
    "constraint": _add_lower_case(_CONSTRAINTS) | {"nonneg", "maxnorm", "unitnorm"},
    "initializer": _add_lower_case(_INITIALIZERS) | {"zero", "one", "normal", "uniform"},
    "regularizer": _add_lower_case(_REGULARIZERS) | {"l1_l2"},
}


class UnknownCodeError(ValueError):
    """A configuration names a class or function that is on no list, and might do anything."""


def drop_compilation(value: Any) -> None:
    """Removes, in place, the optimizers, losses and metrics with which a model and nested ones were compiled."""
    if isinstance(value, dict):
        value.pop("compile_config", None)
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        drop_compilation(entry)


def check_classes(value: Any, owner: str = "the model") -> None:
    """Checks that a configuration names nothing but classes and functions which are known to run no code of a file.

    Args:
      value: The configuration as JSON has it, or a part of it.
      owner: The layer that the part belongs to, for messages.

    Raises:
      UnknownCodeError: If it names something else; names it and the layer.
      ValueError: If it is damaged.
    """
    if isinstance(value, list):
        for entry in value:
            check_classes(entry, owner)
    elif isinstance(value, Mapping):
        if "class_name" in value:
            owner = _check_record(value, owner)
        for entry in value.values():
            check_classes(entry, owner)
    elif value == _ENCODED_TYPE:
        raise UnknownCodeError(f"{owner} encodes types of tensors")


def _check_record(record, owner):
    """Checks one class or function; returns the name of the layer that it is, or else belongs to."""
    kind, config = record["class_name"], record.get("config")
    if not isinstance(kind, str):
        raise ValueError(f"{owner} has the class {_abbreviate(kind)}, which is no name")
    if kind in _VALUES:
        return owner
    if kind in _ARRAYS:
        if not (isinstance(config, Mapping) and _NUMBERS.fullmatch(str(config.get("dtype")))):
            raise ValueError(f"{owner} has an array that is not of numbers")
        return owner
    if kind == "function":
        _check_function(record, owner)
        return owner
    if not isinstance(config, Mapping | list):
        raise ValueError(f"the class {_abbreviate(kind)} of {owner} has no configuration")
    if isinstance(config, Mapping) and isinstance(config.get("name"), str):
        owner = f"layer {_abbreviate(config['name'])}"
    if not (_is_of_keras(record) or _is_registered(record)):
        raise UnknownCodeError(f"{owner} names the class {_describe(record)}")
    for part in _parts_of(record):
        if not (isinstance(part, Mapping) and "class_name" in part):
            raise ValueError(f"{owner} is a {kind} of {_abbreviate(part)}, which is no layer")
    if isinstance(config, Mapping):
        _check_arguments(kind, config, owner)
    return owner


def _parts_of(record):
    """Layers that a model or wrapper holds, whatever they are."""
    config = record["config"]
    if isinstance(config, list):  # a Sequential model of old
        return config
    layers = config.get("layers", [])
    if not isinstance(layers, list):
        raise ValueError(f"the class {_abbreviate(record['class_name'])} has layers that are no list")
    return [*layers, *([config["layer"]] if "layer" in config else [])]


def _is_of_keras(record):
    kind = record["class_name"]
    return (
        kind in _CLASSES
        and record.get("registered_name") in (None, kind)
        and (
            _is_in(_MODULE_OF_KERAS, record.get("module"))
            or (kind in _INITIALIZERS and _is_in(_MODULE_OF_INITIALIZERS, record["module"]))
        )
    )


def _is_registered(record):
    """Whether the class is one that this package or keras.applications has registered."""
    kind = record["class_name"]
    registered_name = record.get("registered_name") or kind
    if not isinstance(registered_name, str) or kind not in (registered_name, registered_name.rpartition(">")[2]):
        return False
    registered = keras.saving.get_custom_objects().get(registered_name)
    return str(getattr(registered, "__module__", "")).startswith(_REGISTERING_PACKAGES) and _is_in(
        _MODULE_OF_REGISTERED_CLASSES, record.get("module")
    )


def _is_in(pattern, module):
    return module is None or (isinstance(module, str) and pattern.fullmatch(module) is not None)


def _check_function(record, owner):
    name = record.get("config")
    known = (
        name in _ACTIVATIONS
        and record.get("registered_name") in (None, name)
        and _is_in(_MODULE_OF_FUNCTIONS, record.get("module"))
    )
    if not known:
        raise UnknownCodeError(f"{owner} names the function {_describe({**record, 'class_name': name})}")


def _check_arguments(kind, config, owner):
    """Checks the arguments of a class whose text Keras takes for names of functions."""
    if kind in ("TFOpLambda", "SlicingOpLambda"):
        function = config.get("function")
        if not (isinstance(function, str) and function in FUNCTIONS):
            raise UnknownCodeError(f"{owner} calls the function {_abbreviate(function)} of TensorFlow")
    for key, value in config.items():
        names = _NAMES_IN_ARGUMENTS.get(key.rpartition("_")[2])
        if names is not None and isinstance(value, str) and value not in names:
            raise UnknownCodeError(f"{owner} names the function {_abbreviate(value)} as its {key}")


def _describe(record):
    """A class or function with the module that it is from."""
    name, module = record.get("registered_name") or record["class_name"], record.get("module")
    if module is None or (_is_in(_MODULE_OF_KERAS, module) and name == record["class_name"]):
        return _abbreviate(name)
    return f"{_abbreviate(name)} of {_abbreviate(module)}"


def _abbreviate(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
