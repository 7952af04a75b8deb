"""Graphs of functional models: walking them, and rebuilding them with other layers. Keras internals are used here only.

The internals are those of Keras 2 (`tf_keras`), whose development has ended.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras


def is_functional(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a model whose graph Keras knows: functional, or a built Sequential.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inputs = keras.Input([3])
      >>> dense = keras.layers.Dense(2)
      >>> graph.is_functional(dense), graph.is_functional(keras.Model(inputs, dense(inputs)))
      (False, True)
    """
    return isinstance(layer, keras.Model) and getattr(layer, "_is_graph_network", False)


def find_layers(
    model: keras.layers.Layer, classes: type | tuple[type, ...] = keras.layers.Layer
) -> list[keras.layers.Layer]:
    """Every layer of the given classes: nested models, layers inside of layers, and the model itself included.

    Args:
      model: Any Keras model or layer.
      classes: Class, or tuple of classes.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.Dense(2), keras.layers.ReLU()])
      >>> [type(layer).__name__ for layer in graph.find_layers(model, keras.layers.ReLU)]
      ['ReLU']
    """
    return [layer for layer in model._flatten_layers() if isinstance(layer, classes)]


def functional_models(model: keras.Model) -> list[keras.Model]:
    """The functional models that a model consists of, each once: the model itself and those nested in it.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inner = keras.Sequential([keras.layers.Dense(2, input_shape=[3])], name="inner")
      >>> outer = keras.Sequential([inner, keras.layers.ReLU()], name="outer")
      >>> [model.name for model in graph.functional_models(outer)]
      ['outer', 'inner']
    """
    return list({id(layer): layer for layer in find_layers(model, keras.Model) if is_functional(layer)}.values())


def leaves(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a functional model, with those of nested models in their place; no layers inside of layers.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inner = keras.Sequential([keras.layers.Dense(2, name="dense", input_shape=[3])])
      >>> outer = keras.Sequential([inner, keras.layers.ReLU(name="relu")])
      >>> [layer.name for layer in graph.leaves(outer)]
      ['dense', 'relu']
    """
    layers = {}
    for layer in model.layers:
        for leaf in leaves(layer) if is_functional(layer) else [layer]:
            layers[id(leaf)] = leaf
    return list(layers.values())


def unique_names(model: keras.Model, layer_class: type[Any] = keras.layers.Layer) -> dict[int, str]:
    """A name for each layer of a class, nested models included: its own name, if no other of these layers has that.

    Layers that share a name get the names of the nested models before it, as in "left_stem".

    Args:
      model: Functional model.
      layer_class: Class of the layers to name.

    Returns:
      {id of the layer: name}.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> left, right = (
      ...     keras.Sequential([keras.layers.Dense(2, name="stem", input_shape=[3])], name=side)
      ...     for side in ("left", "right")
      ... )
      >>> inputs = keras.Input([3])
      >>> model = keras.Model(inputs, left(inputs) + right(inputs))
      >>> sorted(graph.unique_names(model, keras.layers.Dense).values())
      ['left_stem', 'right_stem']
    """
    paths: dict[int, list[str]] = {}

    def walk(owner, path):
        for layer in owner.layers:
            if is_functional(layer):
                walk(layer, [*path, layer.name])
            elif isinstance(layer, layer_class):
                paths.setdefault(id(layer), [*path, layer.name])

    walk(model, [])
    counts = collections.Counter(path[-1] for path in paths.values())
    names: dict[int, str] = {}
    for layer_id, path in paths.items():
        name = path[-1] if counts[path[-1]] == 1 else "_".join(path)
        while name in names.values():
            name += "_"
        names[layer_id] = name
    return names


def nodes(model: keras.Model) -> list[Any]:
    """The calls of layers that make up a functional model, as Keras nodes, in an order of execution; without inputs.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inputs = keras.Input([3])
      >>> model = keras.Model(inputs, keras.layers.ReLU(name="relu")(keras.layers.Dense(2, name="dense")(inputs)))
      >>> [node.layer.name for node in graph.nodes(model)]
      ['dense', 'relu']
    """
    by_depth = sorted(model._nodes_by_depth.items(), reverse=True)
    return [node for _, depth_nodes in by_depth for node in depth_nodes if not node.is_input]


def output_keys(model: keras.Model) -> set[str]:
    """Keys of the output tensors of a functional model, as in `flat_output_ids` of the nodes.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.Dense(2, input_shape=[3]), keras.layers.ReLU()])
      >>> [node.flat_output_ids[0] in graph.output_keys(model) for node in graph.nodes(model)]
      [False, True]
    """
    return {str(id(tensor)) for tensor in tf.nest.flatten(model._nested_outputs)}


def count_uses(model: keras.Model, key: str) -> int:
    """Number of times that the calls and the outputs of a functional model use a tensor.

    Args:
      model: Functional model.
      key: Key of the tensor, from `flat_output_ids` or `flat_input_ids` of a node.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inputs = keras.Input([3])
      >>> features = keras.layers.Dense(3)(inputs)
      >>> model = keras.Model(inputs, keras.layers.Add()([features, features]))
      >>> graph.count_uses(model, graph.nodes(model)[0].flat_output_ids[0])
      2
    """
    return model._tensor_usage_count[key]


def input_names(model: keras.Model) -> list[str]:
    """Names of the inputs of a functional model, in the order of `model.inputs`: keys of its dictionary, or of layers.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> left, right = keras.Input([3], name="left"), keras.Input([3], name="right")
      >>> graph.input_names(keras.Model([left, right], left + right))
      ['left', 'right']
      >>> graph.input_names(keras.Model({"b": left, "a": right}, left + right))
      ['a', 'b']
    """
    names = list(model.input_names)
    # The order in which TensorFlow flattens a dictionary.
    keys = sorted(model.input) if isinstance(model.input, dict) else []
    return keys if len(keys) == len(names) else names


def pack_inputs(model: keras.Model, tensors: Sequence[Any]) -> Any:
    """Puts tensors, one for each input of a functional model, into the structure that the model is called with.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> inputs = {"left": keras.Input([3]), "right": keras.Input([3])}
      >>> model = keras.Model(inputs, inputs["left"] + inputs["right"])
      >>> graph.pack_inputs(model, ["first", "second"])
      {'left': 'first', 'right': 'second'}
    """
    return tf.nest.pack_sequence_as(model._nested_inputs, tensors)


def takes_any_batch(model: keras.Model) -> bool:
    """Whether a functional model computes batches of any size, even if its inputs have a fixed one.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> graph.takes_any_batch(keras.Sequential([keras.Input([2, 3], batch_size=1), keras.layers.Flatten()]))
      True
    """
    if all(tensor.shape[0] is None for tensor in model.inputs):
        return True

    specs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in model.inputs]
    try:
        function = tf.function(lambda *inputs: model(pack_inputs(model, inputs), training=False))
        outputs = function.get_concrete_function(*specs).structured_outputs
    except ValueError:  # a layer that needs the size
        return False
    return all(tensor.shape.rank and tensor.shape[0] is None for tensor in tf.nest.flatten(outputs))


def recast(model: keras.Model, model_class: Callable[..., keras.Model], **arguments: Any) -> keras.Model:
    """Makes a model of another class from the tensors and layers of a functional model, which stays as it is.

    Args:
      model: Functional model.
      model_class: Subclass of `keras.Model`, or that class itself for a plain model.
      **arguments: Further arguments of `model_class`, beside inputs, outputs and name.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.Dense(2, input_shape=[3])])
      >>> plain = graph.recast(model, keras.Model)
      >>> type(plain).__name__, plain.layers[-1] is model.layers[-1]
      ('Functional', True)
    """
    return model_class(pack_inputs(model, model.inputs), model._nested_outputs, name=model.name, **arguments)


def replay(model: keras.Model, inputs: Sequence[Any], replacement: Callable) -> Any:
    """Runs a functional model on new tensors, with `replacement(layer)` called in place of every layer.

    Args:
      model: Functional model.
      inputs: Tensors in the order of `model.inputs`.
      replacement: Function from a layer to a callable that takes the arguments of the layer's calls.

    Returns:
      The outputs, in the model's own structure.

    Example:
      >>> import tensorflow as tf
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.ReLU(input_shape=[2])])
      >>> graph.replay(model, [tf.constant([[-1.0, 2.0]])], lambda layer: tf.abs).numpy().tolist()
      [[1.0, 2.0]]
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


def infer(layer: keras.layers.Layer) -> Callable:
    """The layer as a callable that does not train: called on its own, a layer of random augmentation does by default.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> graph.infer(keras.layers.RandomBrightness(1.0))([[[9.0]]]).numpy().item()
      9.0
    """
    return functools.partial(layer, training=False) if layer._expects_training_arg else layer


def rebuild(
    model: keras.Model,
    replace: Callable[[keras.layers.Layer], Callable],
    replace_input: Callable[[Any], Any] | None = None,
    inline_nested: bool = False,
    input_dtypes: Mapping[str, Any] = MappingProxyType({}),
) -> keras.Model:
    """Builds a new functional model: the graph of `model` with `replace(layer)` called in place of every layer.

    A batch size that inputs have stays only where the model depends on it (see `takes_any_batch`).

    Keras 2 can clone a model one layer for one layer; here a layer may become two, or none. Hence a walk over the
    nodes, as Keras itself does when it calls a functional model. `replace` is called once for each layer, across
    nested models too, and its result is called wherever the layer was.

    Args:
      model: Functional model.
      replace: Function from a layer to a callable that takes the arguments of the layer's calls.
      replace_input: Function from tensor to tensor, called on each input of the model.
      inline_nested: Whether the layers of nested models become layers of the new model itself; by default nested
        models are rebuilt as such.
      input_dtypes: {name of the layer of an input: type of the new model's input}; by default the type it has.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> model = keras.Sequential([keras.layers.Dense(2, name="dense", input_shape=[3])])
      >>> bounded = graph.rebuild(model, lambda layer: lambda x: keras.layers.ReLU(6, name="relu6")(layer(x)))
      >>> [layer.name for layer in bounded.layers[1:]]
      ['dense', 'relu6']
    """
    replacements: dict[int, Callable] = {}

    def inline(nested):
        # A nested model is called with its inputs in one structure; `training` reaches the layers through Keras.
        return lambda inputs, **_: replay(nested, tf.nest.flatten(inputs), find_replacement)

    def find_replacement(layer):
        if id(layer) not in replacements:
            if not is_functional(layer):
                replacements[id(layer)] = replace(layer)
            else:
                replacements[id(layer)] = inline(layer) if inline_nested else rebuild_graph(layer)
        return replacements[id(layer)]

    def rebuild_graph(owner, replace_input=lambda tensor: tensor, dtypes=MappingProxyType({})):
        is_free = takes_any_batch(owner)
        inputs = [
            keras.Input(
                tensor.shape[1:],
                batch_size=None if is_free else tensor.shape[0],
                dtype=dtypes.get(name, tensor.dtype),
                name=name,
            )
            for tensor, name in ((tensor, tensor.node.layer.name) for tensor in owner.inputs)
        ]
        outputs = replay(owner, [replace_input(tensor) for tensor in inputs], find_replacement)
        return keras.Model(pack_inputs(owner, inputs), outputs, name=owner.name)

    return rebuild_graph(model, replace_input or (lambda tensor: tensor), input_dtypes)


class CopyError(ValueError):
    """A layer cannot be made from its configuration."""


def copy_layer(layer: keras.layers.Layer, weights: Sequence[np.ndarray] | None = None, **changes: Any) -> Callable:
    """Copies a layer; the copy computes in the type of its weights, whatever policy trained it.

    Args:
      layer: Any layer that can be made from its configuration.
      weights: Weights of the copy; by default those of `layer`.
      **changes: Changes to the layer's configuration.

    Returns:
      The copy as a callable that takes the arguments of the layer's calls. It has its weights after the first call.

    Raises:
      CopyError: If the layer cannot be made from its configuration.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import graph
      >>> dense = keras.layers.Dense(2)
      >>> model = keras.Sequential([keras.Input([3]), dense])
      >>> outputs = graph.copy_layer(dense, name="copy")(model.input)
      >>> outputs.node.layer.name, [weight.shape for weight in outputs.node.layer.get_weights()]
      ('copy', [(3, 2), (2,)])
    """
    weights = layer.get_weights() if weights is None else weights
    config = layer.get_config() | changes
    if layer.compute_dtype != layer.variable_dtype:
        config["dtype"] = layer.variable_dtype
    try:
        copy = type(layer).from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CopyError(
            f"layer {layer.name!r} ({type(layer).__name__}) cannot be copied; get_config() must give every argument of "
            f"the constructor ({' '.join(str(error).split())[-200:]})"
        ) from None

    def call(*arguments, **keywords):
        outputs = copy(*arguments, **keywords)
        # Only now does every kind of layer have its weights: some create weights or sublayers when they are called.
        copy.set_weights(weights)
        return outputs

    return call
