"""Merging every multi-branch block of a model into one 3x3 convolution, exactly."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock

_CHECK_SIZE = 64


class PreActivationStatistics(NamedTuple):
    """What the normalizations imply about a fused convolution's output, per channel: each of shape [out]."""

    mean: np.ndarray
    variance: np.ndarray


def fuse(model: keras.Model, tolerance: float = 1e-4, check_inputs=None) -> keras.Model:
    """Returns the deploy form of `model`: the same function in float32, one 3x3 convolution per block.

    Works on any functional (or built Sequential) model that contains the blocks, nested models included. All other
    layers are copied; `model` itself stays as it is. The result is then run beside `model` on random input.

    Args:
      model: training-form model.
      tolerance: largest accepted difference of the outputs, relative to the largest output.
      check_inputs: what the check runs on, in the structure of `model.inputs`; by default two random images per
        input, with 64 pixels where the height or width is not fixed.

    Returns:
      A functional model whose fused convolutions have the names of their blocks. Its attribute
      `pre_activation_statistics` maps each of those names to a `PreActivationStatistics`, or to None where the
      block's normalizations do not determine them. (Keras does not save that attribute with the model.)

    Raises:
      ValueError: if `model` is no functional model or holds no block that can be reached.
      ArithmeticError: if the outputs differ by more than `tolerance`; names the measured difference.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "_is_graph_network", False):
        raise ValueError(
            f"fuse needs a functional Keras 2 model, but got {type(model).__name__}; "
            "build it with keras.Model(inputs, outputs)"
        )
    if not _blocks(model):
        raise ValueError(f"model {model.name!r} contains no re-parameterized block, so there is nothing to fuse")
    statistics = {}

    def deploy_form(layer):
        if isinstance(layer, ReparameterizedBlock):
            statistics[layer.name] = _statistics(layer)
            return _deploy_layers(layer)
        if hidden := _blocks(layer):
            raise ValueError(
                f"block {hidden[0].name!r} is inside another layer, where it cannot be replaced; "
                "use blocks directly in functional models"
            )
        return _float32_copy(layer)

    fused = _rebuild(model, deploy_form)
    _check(model, fused, tolerance, check_inputs)
    fused.pre_activation_statistics = statistics
    return fused


def _blocks(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, ReparameterizedBlock)]


def _statistics(block):
    found = block.pre_activation_statistics()
    return None if found is None else PreActivationStatistics(*(value.numpy() for value in found))


def _deploy_layers(block):
    """The block's deploy layers with the merged kernel and bias in place, as one callable."""
    *padding, conv = block.deploy_layers()
    kernel, bias = block.equivalent_kernel_and_bias()
    conv.build((None, None, None, kernel.shape[2] * block.groups))
    conv.set_weights([kernel.numpy(), bias.numpy()])

    def call(inputs, **_):  # the block may have been called with training=False, which a convolution does not know
        for layer in (*padding, conv):
            inputs = layer(inputs)
        return inputs

    return call


def _float32_copy(layer):
    """A copy of a layer with its weights, computing in float32 where it computed in mixed precision; as a callable."""
    config = layer.get_config()
    if layer.compute_dtype != layer.variable_dtype:
        config["dtype"] = layer.variable_dtype
    copy = type(layer).from_config(config)

    def call(*arguments, **keywords):
        outputs = copy(*arguments, **keywords)
        # Only now does every kind of layer have its weights: some make theirs, or their sublayers', when called.
        copy.set_weights(layer.get_weights())
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
            is_model = isinstance(layer, keras.Model) and getattr(layer, "_is_graph_network", False)
            replacements[id(layer)] = _rebuild(layer, replace, replacements) if is_model else replace(layer)
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
    expected, found = (
        np.concatenate([np.ravel(output) for output in tf.nest.flatten(form(inputs, training=False))])
        for form in (model, fused)
    )
    difference = np.max(np.abs(expected - found)) / max(np.max(np.abs(expected)), np.finfo("float32").tiny)
    if not difference <= tolerance:
        raise ArithmeticError(
            f"fusing model {model.name!r} changed its outputs by {difference:.2e} of the largest output, "
            f"more than the tolerance {tolerance:g}; nothing was returned"
        )
