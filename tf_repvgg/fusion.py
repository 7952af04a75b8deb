"""Merging every multi-branch block of a model into one 3x3 convolution, and batch normalizations, exactly."""

import collections
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.layers.batch_norm import scale_and_shift

_CHECK_SIZE = 64
# Exactly these: a subclass may do more with its kernel.
_MERGED_TYPES = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)


class PreActivationStatistics(NamedTuple):
    """What the normalizations imply about a fused convolution's output, per channel: each of shape [out]."""

    mean: np.ndarray
    variance: np.ndarray


def fuse(model: keras.Model, tolerance: float = 1e-4, check_inputs=None) -> keras.Model:
    """Returns the deploy form of `model`: the same function in float32, one 3x3 convolution per block.

    Works on any functional (or built Sequential) model that contains the blocks, nested models included. A batch
    normalization right after a Conv2D, DepthwiseConv2D or Dense layer without activation is merged into that layer, as
    integer runtimes need it. All other layers are copied; `model` itself stays as it is. The result is then run beside
    `model` on random input.

    Args:
      model: training-form model.
      tolerance: largest accepted difference of an output, relative to its largest value.
      check_inputs: what the check runs on, in the structure of `model.inputs`; by default two random images per
        input, with 64 pixels where the height or width is not fixed.

    Returns:
      A functional model whose fused convolutions have the names of their blocks; where blocks of several nested models
      have one name, those of the models before it, as in "left_stem". Its attribute `pre_activation_statistics`
      maps each of those names to a `PreActivationStatistics`, or to None where the block's normalizations do not
      determine them. (Keras does not save that attribute with the model.)

    Raises:
      ValueError: if `model` is no functional model or holds no block that can be reached.
      ArithmeticError: if an output differs by more than `tolerance`; names it and the measured difference.
    """
    if not _is_functional(model):
        raise ValueError(
            f"fuse needs a functional Keras 2 model, but got {type(model).__name__}; "
            "build it with keras.Model(inputs, outputs)"
        )
    if not _blocks(model):
        raise ValueError(f"model {model.name!r} contains no re-parameterized block, so there is nothing to fuse")
    names = _unique_names(model)
    norm_of = _norms_to_merge(model)
    merged_norms = {id(norm) for norm in norm_of.values()}
    statistics = {}

    def deploy_form(layer):
        if isinstance(layer, ReparameterizedBlock):
            statistics[names[id(layer)]] = _statistics(layer)
            return _block_in_deploy_form(layer, names[id(layer)])
        if hidden := _blocks(layer):
            raise ValueError(
                f"block {hidden[0].name!r} is inside another layer, where it cannot be replaced; "
                "use blocks directly in functional models"
            )
        if id(layer) in norm_of:
            return _merged(layer, norm_of[id(layer)])
        if id(layer) in merged_norms:
            return lambda inputs, **_: inputs
        return _float32_copy(layer)

    fused = _rebuild(model, deploy_form)
    _check(model, fused, tolerance, check_inputs)
    fused.pre_activation_statistics = statistics
    return fused


def _is_functional(layer):
    return isinstance(layer, keras.Model) and getattr(layer, "_is_graph_network", False)


def _blocks(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, ReparameterizedBlock)]


def _unique_names(model):
    """A name for each block's convolution, by id of the block: the block's own, or with its nested models before it."""
    paths = {}

    def walk(owner, path):
        for layer in owner.layers:
            if isinstance(layer, ReparameterizedBlock):
                paths.setdefault(id(layer), [*path, layer.name])
            elif _is_functional(layer):
                walk(layer, [*path, layer.name])

    walk(model, [])
    counts = collections.Counter(path[-1] for path in paths.values())
    names = {}
    for block, path in paths.items():
        name = path[-1] if counts[path[-1]] == 1 else "_".join(path)
        while name in names.values():
            name += "_"
        names[block] = name
    return names


def _norms_to_merge(model):
    """{id of a linear layer: the batch normalization that is all that its output goes into}."""
    owners = {id(layer): layer for layer in model._flatten_layers() if _is_functional(layer)}.values()
    nodes = [(owner, node) for owner in owners for nodes in owner._nodes_by_depth.values() for node in nodes]
    calls = collections.Counter(id(node.layer) for _, node in nodes)
    sources = {key: node.layer for _, node in nodes for key in node.flat_output_ids}
    found = {}
    for owner, node in nodes:
        norm = node.layer
        if not isinstance(norm, keras.layers.BatchNormalization) or node.call_kwargs.get("training"):
            continue
        (key,) = node.flat_input_ids
        source = sources[key]
        is_all = owner._tensor_usage_count[key] == calls[id(source)] == calls[id(norm)] == 1
        is_linear = type(source) in _MERGED_TYPES and source.activation is keras.activations.linear
        if is_all and is_linear and list(norm.axis) == [len(source.output_shape) - 1]:
            found[id(source)] = norm
    return found


def _statistics(block):
    found = block.pre_activation_statistics()
    return None if found is None else PreActivationStatistics(*(value.numpy() for value in found))


def _block_in_deploy_form(block, name):
    deploy_form = block.deploy_form(name)
    # The block may have been called with training=False, which a convolution does not know.
    return lambda inputs, **_: deploy_form(inputs)


def _merged(layer, norm):
    """A copy of a linear layer with the normalization that follows it in its weights, as a callable."""
    scale, shift = (np.asarray(value) for value in scale_and_shift(norm))
    kernel, *bias = layer.get_weights()
    # A depthwise kernel's output channels are its last two axes.
    channels = kernel.shape[-2:] if isinstance(layer, keras.layers.DepthwiseConv2D) else kernel.shape[-1:]
    weights = [kernel * scale.reshape(channels), sum(bias) * scale + shift]
    return _copy(layer, {"use_bias": True}, weights)


def _float32_copy(layer):
    """A copy of a layer with its weights, computing in float32 where it computed in mixed precision; as a callable."""
    return _copy(layer, {}, layer.get_weights())


def _copy(layer, changes, weights):
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


def _rebuild(model, replace, replacements=None):
    """Replays the graph of a functional model with `replace(layer)` called in place of every layer.

    Keras 2 can clone a model one layer for one layer; a block may become two. Hence a walk over the nodes, as Keras
    itself does when it calls a functional model; shared layers are replaced once, across nested models too.
    """
    replacements = {} if replacements is None else replacements

    def replacement(layer):
        if id(layer) not in replacements:
            is_nested = _is_functional(layer)
            replacements[id(layer)] = _rebuild(layer, replace, replacements) if is_nested else replace(layer)
        return replacements[id(layer)]

    inputs = [keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=tensor.node.layer.name) for tensor in model.inputs]
    uses = model._tensor_usage_count
    tensors = {}

    def store(key, tensor):
        # `map_arguments` takes one element off the list per use.
        tensors[key] = [tensor] * uses[key]

    for old, new in zip(model.inputs, inputs, strict=True):
        store(str(id(old)), new)
    for _, nodes in sorted(model._nodes_by_depth.items(), reverse=True):
        for node in nodes:
            if node.is_input:
                continue
            arguments, keywords = node.map_arguments(tensors)
            outputs = tf.nest.flatten(replacement(node.layer)(*arguments, **keywords))
            for key, output in zip(node.flat_output_ids, outputs, strict=True):
                store(key, output)
    outputs = tf.nest.map_structure(lambda tensor: tensors[str(id(tensor))].pop(), model._nested_outputs)
    nested_inputs = tf.nest.pack_sequence_as(model._nested_inputs, inputs)
    return keras.Model(nested_inputs, outputs, name=model.name)


def _check(model, fused, tolerance, inputs):
    if any(layer.compute_dtype != layer.variable_dtype for layer in model._flatten_layers(include_self=False)):
        model = _rebuild(model, _float32_copy)
    if inputs is None:
        generator = np.random.default_rng(0)
        inputs = [
            generator.standard_normal([2, *(size or _CHECK_SIZE for size in tensor.shape[1:])]).astype("float32")
            for tensor in model.inputs
        ]
        inputs = tf.nest.pack_sequence_as(model._nested_inputs, inputs)
    expected, found = (tf.nest.flatten(form(inputs, training=False)) for form in (model, fused))
    for name, mine, its in zip(model.output_names, expected, found, strict=True):
        mine, its = np.asarray(mine, np.float64), np.asarray(its, np.float64)
        difference = np.max(np.abs(mine - its)) / max(np.max(np.abs(mine)), np.finfo("float32").tiny)
        if not difference <= tolerance:
            raise ArithmeticError(
                f"fusing model {model.name!r} changed its output {name!r} by {difference:.2e} of its largest value, "
                f"more than the tolerance {tolerance:g}; nothing was returned"
            )
