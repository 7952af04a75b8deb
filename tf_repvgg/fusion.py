"""Merging every multi-branch block of a model into one 3x3 convolution, and batch normalizations, exactly."""

import collections
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
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

    Works on any functional (or built Sequential) model that contains the blocks, nested models included; also on
    models of other layers, for their batch normalizations. A batch
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
      ValueError: if `model` is no functional model, or holds no block or normalization that can be merged.
      ArithmeticError: if an output differs by more than `tolerance`; names it and the measured difference.
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"fuse needs a functional Keras 2 model, but got {type(model).__name__}; "
            "build it with keras.Model(inputs, outputs)"
        )
    norm_of = _norms_to_merge(model)
    if not (_blocks(model) or norm_of):
        raise ValueError(
            f"model {model.name!r} contains no re-parameterized block, nor a batch normalization right after a linear "
            "layer, so there is nothing to fuse"
        )
    names = graph.unique_names(model, ReparameterizedBlock)
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
        return graph.copy_layer(layer)

    fused = graph.rebuild(model, deploy_form)
    _check(model, fused, tolerance, check_inputs)
    fused.pre_activation_statistics = statistics
    return fused


def needs_fusing(model: keras.Model) -> bool:
    """Whether the model holds blocks in training form."""
    return bool(_blocks(model))


def _blocks(model):
    return graph.find_layers(model, ReparameterizedBlock)


def _norms_to_merge(model):
    """{id of a linear layer: the batch normalization that is the only reader of its output}."""
    calls = [(owner, node) for owner in graph.functional_models(model) for node in graph.nodes(owner)]
    call_counts = collections.Counter(id(node.layer) for _, node in calls)
    sources = {key: node.layer for _, node in calls for key in node.flat_output_ids}
    norms = {}
    for owner, node in calls:
        norm = node.layer
        if not isinstance(norm, keras.layers.BatchNormalization) or node.call_kwargs.get("training"):
            continue
        (key,) = node.flat_input_ids
        source = sources.get(key)
        if source is None:  # an input of the model
            continue
        is_only_reader = graph.count_uses(owner, key) == call_counts[id(source)] == call_counts[id(norm)] == 1
        is_linear = type(source) in _MERGED_TYPES and source.activation is keras.activations.linear
        if is_only_reader and is_linear and list(norm.axis) == [len(source.output_shape) - 1]:
            norms[id(source)] = norm
    return norms


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
    return graph.copy_layer(layer, weights, use_bias=True)


def _check(model, fused, tolerance, inputs):
    if any(layer.compute_dtype != layer.variable_dtype for layer in graph.find_layers(model) if layer is not model):
        model = graph.rebuild(model, graph.copy_layer)
    if inputs is None:
        generator = np.random.default_rng(0)
        inputs = [
            generator.standard_normal([2, *(size or _CHECK_SIZE for size in tensor.shape[1:])]).astype("float32")
            for tensor in model.inputs
        ]
        inputs = graph.pack_inputs(model, inputs)
    expected, found = (tf.nest.flatten(form(inputs, training=False)) for form in (model, fused))
    for name, mine, its in zip(model.output_names, expected, found, strict=True):
        mine, its = np.asarray(mine, np.float64), np.asarray(its, np.float64)
        difference = np.max(np.abs(mine - its)) / max(np.max(np.abs(mine)), np.finfo("float32").tiny)
        if not difference <= tolerance:
            raise ArithmeticError(
                f"fusing model {model.name!r} changed its output {name!r} by {difference:.2e} of its largest value, "
                f"more than the tolerance {tolerance:g}; nothing was returned"
            )
