"""Replaying the graph of a functional model with other layers in it."""

import collections
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras


def is_functional(layer) -> bool:
    """Whether a layer is a model whose graph Keras knows: functional, or a built Sequential."""
    return isinstance(layer, keras.Model) and getattr(layer, "_is_graph_network", False)


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
        nested_inputs = tf.nest.pack_sequence_as(owner._nested_inputs, inputs)
        return keras.Model(nested_inputs, outputs, name=owner.name)

    return rebuilt(model, replace_input) if replace_input else rebuilt(model)


def copied(layer, weights=None, **changes) -> Callable:
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
