"""Models of Keras 3 rebuilt in Keras 2 from their config.json, functional and Sequential ones, nested or not."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg.checkpoints import keras3_layers
from tf_repvgg.checkpoints.keras3_layers import Record
from tf_repvgg.checkpoints.model_limits import MOST_CONSTANTS, check_number_of_calls

_FUNCTIONAL, _SEQUENTIAL = ("Functional", "Model"), ("Sequential",)


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """A layer whose weights are in the file.

    Attributes:
      path: Path of the layer within the file of weights: "layers/conv2d_1".
      name: Name of the layer in the file.
      layer: The layer in the rebuilt model.
    """

    path: str
    name: str
    layer: keras.layers.Layer


def build_model(record: Record) -> tuple[keras.Model, list[StoredLayer]]:
    """Builds a model with fresh weights, and says where each layer's weights are.

    Args:
      record: Content of config.json.

    Raises:
      ValueError: If something in it has no counterpart in Keras 2. The message names the layer and its class.
    """
    with _name_layer(record):
        check_number_of_calls(record)
        return _Builder().build(record)


@contextlib.contextmanager
def _name_layer(record: Any) -> Iterator[None]:
    """Puts the layer's name before an error, unless it is that of a layer inside this one."""
    try:
        yield
    except (_LayerError, _NotYet):
        raise
    except Exception as error:  # a configuration from a file may hold anything, and layers refuse it in many ways
        config = record.get("config") if isinstance(record, Mapping) else None
        name = config.get("name") if isinstance(config, Mapping) else None
        kind = record.get("class_name") if isinstance(record, Mapping) else type(record).__name__
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise _LayerError(f"layer {name!r} ({kind}): {reason.strip().partition(chr(10))[0]}") from None


class _LayerError(ValueError):
    """An error that names a layer."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """A layer, operation or nested model.

    Attributes:
      call: Function of tensors.
      stored: Its layers with weights, with paths relative to it.
      first_call: Number of its first call where a model's inputs and outputs are listed; elsewhere it is 0.
    """

    call: Callable[..., Any]
    stored: list[StoredLayer]
    first_call: int = 0


class _Builder:
    def __init__(self):
        self._shared: dict[int, _Part] = {}  # by the number under which Keras 3 knows an object that it meets again

    def build(self, record: Record) -> tuple[keras.Model, list[StoredLayer]]:
        kind, config = record["class_name"], record["config"]
        if not str(record.get("module")).startswith("keras") or kind not in _FUNCTIONAL + _SEQUENTIAL:
            raise ValueError(
                "this class of models cannot be read, since what it computes is in its own code; known: functional and "
                "Sequential models"
            )
        parts = _name_paths(config["layers"], [self._make_part(layer) for layer in config["layers"]])
        connect = _connect_functional if kind in _FUNCTIONAL else _connect_sequential
        inputs, outputs = connect(config, [part for part, _ in parts])
        stored = [
            dataclasses.replace(layer, path=f"{path}/{layer.path}".removesuffix("/"))
            for part, path in parts
            for layer in part.stored
        ]
        return keras.Model(inputs, outputs, name=config["name"]), stored

    def _make_part(self, record: Record) -> _Part:
        with _name_layer(record):
            key = record.get("shared_object_id")
            if key in self._shared:
                return dataclasses.replace(self._shared[key], stored=[])  # written once, at its first place
            part = self._make_new_part(record)
            if key is not None:
                self._shared[key] = part
            return part

    def _make_new_part(self, record: Record) -> _Part:
        kind, module, name = record["class_name"], str(record.get("module")), record["config"]["name"]
        if kind in _FUNCTIONAL + _SEQUENTIAL:
            model, stored = self.build(record)
            return _Part(model, stored, first_call=1 if kind in _FUNCTIONAL else 0)
        if keras3_layers.is_operation(record):
            return _Part(keras3_layers.make_operation(record), [])
        if module != "keras.layers" and not module.startswith("keras.src.layers"):
            raise ValueError(
                f"this class is of {record.get('registered_name') or module!r}, not of Keras, and what it computes is "
                "in its own code; replace it by layers of Keras"
            )
        if kind == "InputLayer":
            return _Part(_make_input(record["config"]), [])
        call = keras3_layers.make_layer(record)
        layer = call if isinstance(call, keras.layers.Layer) else call.layer
        return _Part(call, [] if layer is None else [StoredLayer("", name, layer)])


def _make_input(config):
    if config.get("sparse") or config.get("ragged") or config.get("optional"):
        raise ValueError("it takes sparse, ragged or optional inputs; build it for dense ones")
    if not str(config["dtype"]).startswith(("float", "bfloat")):
        raise ValueError(f"its type is {config['dtype']}; build the network for inputs of type float32")
    batch, *shape = config["batch_shape"]
    return lambda: keras.Input(shape, batch, name=config["name"])


def _name_paths(records, parts):
    """Pairs of a part and its path, which Keras 3 forms from classes alone."""
    counts: dict[str, int] = {}
    pairs = []
    for record, part in zip(records, parts, strict=True):
        if keras3_layers.is_operation(record):  # which is no layer
            pairs.append((part, ""))
            continue
        name = _to_snake_case(record["class_name"])
        number = counts[name] = counts.get(name, -1) + 1
        pairs.append((part, f"layers/{name}_{number}" if number else f"layers/{name}"))
    return pairs


def _to_snake_case(name):
    """As keras.src.utils.naming.to_snake_case."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _connect_sequential(config, parts):
    records = config["layers"]
    if records and records[0]["class_name"] == "InputLayer":
        inputs, parts, records = parts[0].call(), parts[1:], records[1:]
    elif shape := config.get("build_input_shape"):
        inputs = keras.Input(shape[1:], shape[0])
    else:
        raise ValueError(
            "it was saved before it was built; call it on an image, or give it an Input, and save it again"
        )
    outputs = inputs
    for part, record in zip(parts, records, strict=True):
        with _name_layer(record):
            outputs = _call_alone(part, outputs)
    return inputs, outputs


def _connect_functional(config, parts):
    """Makes all calls, each as soon as its inputs exist."""
    results: dict[str, list[Any]] = {}
    first_calls = {record["name"]: part.first_call for record, part in zip(config["layers"], parts, strict=True)}
    waiting = []
    for record, part in zip(config["layers"], parts, strict=True):
        results[record["name"]] = []
        if record["class_name"] == "InputLayer":
            results[record["name"]].append(part.call())
        waiting.append((record, part, list(record["inbound_nodes"])))

    def find_tensor(history):
        name, call, index = history
        if call >= len(results[name]):
            raise _NotYet
        outputs = results[name][call]
        tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
        return tensors[index]

    while any(nodes for *_, nodes in waiting):
        before = sum(len(nodes) for *_, nodes in waiting)
        for record, part, nodes in waiting:
            with contextlib.suppress(_NotYet), _name_layer(record):
                while nodes:
                    results[record["name"]].append(_call(part, record, nodes[0], find_tensor))
                    del nodes[0]
        if sum(len(nodes) for *_, nodes in waiting) == before:
            raise ValueError("its layers have no order in which they could be called")

    def find_end(history):
        name, call, index = history
        return find_tensor((name, call - first_calls[name], index))

    return _find_ends(config["input_layers"], find_end), _find_ends(config["output_layers"], find_end)


class _NotYet(Exception):
    """An input of a call does not exist yet."""


def _call(part, record, node, find_tensor):
    if not isinstance(node, Mapping):
        raise ValueError("its calls are written as before Keras 3; load the network there and save it again")
    arguments = [_fill(value, find_tensor) for value in node["args"]]
    options = {key: _fill(value, find_tensor) for key, value in node["kwargs"].items()}
    if not isinstance(part.call, keras.layers.Layer | keras3_layers.Chain):
        return part.call(*arguments, **options)
    options = {key: value for key, value in options.items() if value is not None}
    if keras3_layers.is_augmentation(record):
        options.pop("training", None)
    if len(arguments) != 1 or options.get("training") or not options.keys() <= {"training"}:
        raise ValueError(
            f"it is called with {len(arguments)} arguments and {', '.join(options) or 'no options'}; known: its inputs "
            "alone, and training=False"
        )
    return _call_alone(part, *arguments)


def _call_alone(part, inputs):
    """Calls a layer with its inputs, unless it would spread constants over more numbers than a network needs."""
    layer = part.call
    if isinstance(layer, keras.layers.Normalization) and layer.input_mean is not None:
        sizes = [inputs.shape[axis] for axis in layer.axis]
        if None in sizes or math.prod(sizes) > MOST_CONSTANTS:
            raise ValueError(
                f"it normalizes with constants along axes of the sizes {sizes}, which must be known, and at most "
                f"{MOST_CONSTANTS:,} together"
            )
    return layer(inputs)


def _fill(value, find_tensor):
    """An argument of a call with its tensors."""
    if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
        return find_tensor(value["config"]["keras_history"])
    if isinstance(value, list):
        return [_fill(element, find_tensor) for element in value]
    return keras3_layers.read_constant(value)


def _find_ends(ends, find_tensor):
    """Inputs or outputs of a model."""
    if isinstance(ends, Mapping):
        raise ValueError("its inputs or outputs are a dictionary; build it with a list, or with one tensor")
    if len(ends) == 3 and isinstance(ends[0], str):
        return find_tensor(ends)
    return [_find_ends(end, find_tensor) for end in ends]
