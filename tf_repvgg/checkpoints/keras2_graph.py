"""The calls of layers in a model of Keras 2: they must have an order, and be of a number that can be built."""

import graphlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tf_repvgg.checkpoints.keras2_config import MODELS
from tf_repvgg.checkpoints.model_limits import MOST_CONSTANTS, check_number_of_calls

# Keras looks at all layers of a Sequential model again with each one that it adds.
_MOST_LAYERS_IN_SEQUENCE = 1000
# Arguments of TensorFlow's functions that are numbers of tensors or of axes, which Python counts one by one.
_COUNTS = ("axes", "num", "num_or_size_splits")
_LARGEST_COUNT = 4096

# Layers that may be before a Normalization with constants.
_KEEP_SHAPE = ("Activation", "Dropout", "Identity", "Normalization", "ReLU", "Rescaling")

_CONSTANT = "_CONSTANT_VALUE"


def check_calls(record: Mapping[str, Any]) -> None:
    """Checks that all layers of a model, and of nested ones, can be called.

    Keras would try for ever to call layers that wait for each other.

    Args:
      record: The model as Keras describes it, whose classes `keras2_config.check_classes` has checked.

    Raises:
      ValueError: If there is no order, there are too many calls, or calls are damaged; names the layer.
    """
    check_number_of_calls(record, _check_config)


def _check_config(config):
    """Checks a model or wrapper, but not what is nested in it."""
    if "layer" in config:
        if _has_constants(config["layer"]):
            raise ValueError(f"layer {config.get('name')!r} wraps a Normalization with constants")
        return
    layers = config if isinstance(config, list) else config.get("layers", [])
    if isinstance(config, list) or "input_layers" not in config:
        if len(layers) > _MOST_LAYERS_IN_SEQUENCE:
            raise ValueError(f"a Sequential model has more than {_MOST_LAYERS_IN_SEQUENCE:,} layers")
        for index, layer in enumerate(layers):
            _check_constants(layer, reversed(layers[: index + 1]))
        return
    by_name = {_name_of(layer): layer for layer in layers}
    if len(by_name) < len(layers):
        raise ValueError(f"model {config.get('name')!r} has two layers of one name")
    _check_order(layers, {name: _nodes_of(layer) for name, layer in by_name.items()})
    for layer in layers:
        _check_constants(layer, _go_back(layer, by_name))


def _go_back(layer, layers):
    """A layer, the one before it, and so on, as long as each is called once with one input."""
    yield layer
    while len(nodes := _nodes_of(layer)) == 1 and len(sources := list(_find_sources(nodes[0]))) == 1:
        layer = layers[sources[0][0]]
        yield layer


def _has_constants(layer):
    return layer["class_name"] == "Normalization" and layer["config"].get("mean") is not None


def _check_constants(layer, layers_before):
    """Keras spreads the constants of a Normalization over its axes, whatever size these have, when it builds it.

    So their size must be known, from the input of the model.
    """
    if not _has_constants(layer):
        return
    for source in layers_before:
        shape, axes = source["config"].get("batch_input_shape"), layer["config"].get("axis", -1)
        if shape is not None or source["class_name"] not in _KEEP_SHAPE:
            break
    try:
        sizes = [int(shape[axis]) for axis in ([axes] if isinstance(axes, int) else axes or [])]
        if not all(0 <= size <= MOST_CONSTANTS for size in sizes) or math.prod(sizes) > MOST_CONSTANTS:
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise ValueError(
            f"layer {layer['config'].get('name')!r} normalizes with constants along axes of a size that is not "
            f"known, or above {MOST_CONSTANTS:,}; place it after the input"
        ) from None


def _name_of(layer):
    name = layer.get("name")
    if not isinstance(name, str):
        raise ValueError(f"a layer of the class {layer['class_name']!r} has no name")
    return name


def _nodes_of(layer):
    nodes = layer.get("inbound_nodes", [])
    if not isinstance(nodes, list):
        raise ValueError(f"the calls of layer {layer['name']!r} are no list")
    return nodes


def _check_order(layers, nodes):
    """Checks that every call can be made after those that make its inputs."""
    first_calls = {_name_of(layer): _number_first_call(layer) for layer in layers}
    inputs = {_name_of(layer) for layer in layers if layer["class_name"] == "InputLayer"}
    sorter: graphlib.TopologicalSorter[tuple[str, int]] = graphlib.TopologicalSorter()
    for name, calls in nodes.items():
        for number, node in enumerate(calls, first_calls[name]):
            sources = list(_find_sources(node))
            if not sources:
                raise ValueError(f"layer {name!r} is called with constants alone")
            for source, source_number in sources:
                count = len(nodes.get(source, ()))
                if source not in nodes or (
                    source not in inputs and not 0 <= source_number - first_calls[source] < count
                ):
                    raise ValueError(
                        f"layer {name!r} takes the output of call {source_number} of {source!r}, which is not made"
                    )
            before = [(name, number - 1)] if number > first_calls[name] else []
            sorter.add((name, number), *before, *(source for source in sources if source[0] not in inputs))
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        names = " and ".join(dict.fromkeys(repr(name) for name, _ in error.args[1]))
        raise ValueError(
            f"its layers have no order in which they could be called: {names} wait for each other"
        ) from None


def _number_first_call(layer):
    """The number of a layer's first call: a model that knows its inputs was called with these when it was made."""
    kind, config = layer["class_name"].rpartition(">")[2], layer["config"]
    if kind == "Sequential":
        layers = config if isinstance(config, list) else config.get("layers", [])
        is_built = isinstance(config, Mapping) and config.get("build_input_shape")
        first = layers[0] if layers else {}
        knows_inputs = (
            not layers or is_built or first["class_name"] == "InputLayer" or "batch_input_shape" in first["config"]
        )
        return int(bool(knows_inputs))
    return int(kind in MODELS or (isinstance(config, Mapping) and "input_layers" in config))


def _find_sources(node: Any) -> Iterator[tuple[str, int]]:
    """Layers whose outputs a call takes, each with the number of its call, as Keras finds them."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in _COUNTS and isinstance(value, int) and value > _LARGEST_COUNT:
                raise ValueError(f"a function of TensorFlow is called with {key}={value}")
            yield from _find_sources(value)
    elif isinstance(node, list) and len(node) in (3, 4) and isinstance(node[0], str):
        name, number, *_ = node
        if name != _CONSTANT:
            if not isinstance(number, int):
                raise ValueError(f"a call of layer {name!r} has the number {number!r}")
            yield name, number
        yield from _find_sources(node[3:])
    elif isinstance(node, list):
        for entry in node:
            yield from _find_sources(entry)
