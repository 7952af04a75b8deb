"""Replaying the graph of a functional model with other layers in it."""

import collections
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras


def is_functional(layer) -> bool:
    """Whether a layer is a model whose graph Keras knows: functional, or a built Sequential."""
    return isinstance(layer, keras.Model) and getattr(layer, "_is_graph_network", False)


def find_layers(model: keras.Model, kinds: type | tuple[type, ...] = keras.layers.Layer) -> list:
    """Every layer of the given classes: nested models, layers inside of layers, and the model itself included.

    Args:
      model: Any Keras model or layer.
      kinds: Class, or tuple of classes.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.Dense(2), keras.layers.ReLU()])
      >>> [type(layer).__name__ for layer in graph.find_layers(model, keras.layers.ReLU)]
      ['ReLU']
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


def functional_models(model: keras.Model) -> list[keras.Model]:
    """The functional models that a model consists of, each once: itself and those nested in it."""
    return list({id(layer): layer for layer in find_layers(model, keras.Model) if is_functional(layer)}.values())


def leaves(model: keras.Model) -> list:
    """The layers of a functional model, those of nested models in their place; not what layers are made of inside."""
    found = {}
    for layer in model.layers:
        for leaf in leaves(layer) if is_functional(layer) else [layer]:
            found[id(leaf)] = leaf
    return list(found.values())


def unique_names(model: keras.Model, of=keras.layers.Layer) -> dict[int, str]:
    """A name for each layer of class `of`, by id of the layer, nested models included.

    It is the layer's own; where several have one name, that with the nested models' before it, as in "left_stem".
    """
    paths = {}

    def walk(owner, path):
        for layer in owner.layers:
            if is_functional(layer):
                walk(layer, [*path, layer.name])
            elif isinstance(layer, of):
                paths.setdefault(id(layer), [*path, layer.name])

    walk(model, [])
    counts = collections.Counter(path[-1] for path in paths.values())
    names = {}
    for layer, path in paths.items():
        name = path[-1] if counts[path[-1]] == 1 else "_".join(path)
        while name in names.values():
            name += "_"
        names[layer] = name
    return names


def nodes(model: keras.Model) -> list:
    """The calls of layers that make up a functional model, in an order in which they can be made; not its inputs."""
    by_depth = sorted(model._nodes_by_depth.items(), reverse=True)
    return [node for _, of_depth in by_depth for node in of_depth if not node.is_input]


def output_keys(model: keras.Model) -> set[str]:
    """Keys of the output tensors of a functional model, as `flat_output_ids` of its nodes has them."""
    return {str(id(tensor)) for tensor in tf.nest.flatten(model._nested_outputs)}


def count_uses(model: keras.Model, key: str) -> int:
    """How often the calls of a functional model, and its outputs, use the tensor of a key."""
    return model._tensor_usage_count[key]


def pack_inputs(model: keras.Model, tensors: list):
    """A list of tensors, one for each input of a functional model, in the structure that the model is called with."""
    return tf.nest.pack_sequence_as(model._nested_inputs, tensors)


def replay(model: keras.Model, inputs: list, replacement: Callable):
    """Runs a functional model on new tensors, with `replacement(layer)` called in place of every layer.

    Args:
      model: functional model.
      inputs: tensors in the order of `model.inputs`.
      replacement: layer -> callable on what the layer is called with.

    Returns:
      The outputs, in the model's own structure.
    """
    uses = model._tensor_usage_count
    tensors = {}

    def store(key, tensor):
        # `map_arguments` takes one element off the list per use.
        tensors[key] = [tensor] * uses[key]

    for old, new in zip(model.inputs, inputs, strict=True):
        store(str(id(old)), new)
    for node in nodes(model):
        arguments, keywords = node.map_arguments(tensors)
        outputs = tf.nest.flatten(replacement(node.layer)(*arguments, **keywords))
        for key, output in zip(node.flat_output_ids, outputs, strict=True):
            store(key, output)
    return tf.nest.map_structure(lambda tensor: tensors[str(id(tensor))].pop(), model._nested_outputs)


def rebuild(
    model: keras.Model,
    replace: Callable,
    replace_input: Callable | None = None,
    inline_nested: bool = False,
) -> keras.Model:
    """A new functional model: the graph of `model` with `replace(layer)` called in place of every layer.

    Keras 2 can clone a model one layer for one layer; a layer may become two, or none. Hence a walk over the nodes, as
    Keras itself does when it calls a functional model. `replace` is asked once for each layer, across nested models
    too, and what it returns is called wherever the layer was.

    Args:
      model: functional model.
      replace: layer -> callable on what the layer is called with.
      replace_input: tensor -> tensor, called on each input of the model.
      inline_nested: whether the layers of nested models become layers of the new model itself; by default nested
        models are rebuilt as such.
    """
    replacements = {}

    def inlined(nested):
        # A nested model is called with its inputs in one structure; `training` goes to layers by Keras's own ways.
        return lambda inputs, **_: replay(nested, tf.nest.flatten(inputs), replacement)

    def replacement(layer):
        if id(layer) not in replacements:
            if not is_functional(layer):
                replacements[id(layer)] = replace(layer)
            else:
                replacements[id(layer)] = inlined(layer) if inline_nested else rebuilt(layer)
        return replacements[id(layer)]

    def rebuilt(owner, replace_input=lambda tensor: tensor):
        inputs = [
            keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=tensor.node.layer.name) for tensor in owner.inputs
        ]
        outputs = replay(owner, [replace_input(tensor) for tensor in inputs], replacement)
        return keras.Model(pack_inputs(owner, inputs), outputs, name=owner.name)

    return rebuilt(model, replace_input) if replace_input else rebuilt(model)


def copy_layer(layer, weights=None, **changes) -> Callable:
    """A copy of a layer that computes in the type of its weights whatever policy trained it, as a callable on tensors.

    Args:
      layer: any layer that can be made from its configuration.
      weights: what the copy holds; by default the layer's own.
      **changes: to the layer's configuration.
    """
    weights = layer.get_weights() if weights is None else weights
    config = layer.get_config() | changes
    if layer.compute_dtype != layer.variable_dtype:
        config["dtype"] = layer.variable_dtype
    copy = type(layer).from_config(config)

    def call(*arguments, **keywords):
        outputs = copy(*arguments, **keywords)
        # Only now does every kind of layer have its weights: some make theirs, or their sublayers', when called.
        copy.set_weights(weights)
        return outputs

    return call
