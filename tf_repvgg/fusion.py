"""Fusion, exactly: every multi-branch block becomes one 3x3 convolution, and batch normalizations are merged."""

import collections
import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.layers.batch_norm import scale_and_shift
from tf_repvgg.layers.separable_convolution import split_separable_convolution

_CHECK_SIZE = 64
# Standard deviations of random inputs for the check.
_CHECK_MAGNITUDES = (1.0, 0.1, 0.01)
# Exactly these: a subclass may do more with its kernel.
_MERGED_TYPES = (
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
    keras.layers.SeparableConv2D,
)
# Layers that compute nothing when a model is not in training.
_DROPOUTS = (keras.layers.Dropout, keras.layers.GaussianDropout, keras.layers.GaussianNoise)


class PreActivationStatistics(NamedTuple):
    """Statistics of a fused convolution's output before its activation, as the merged normalizations imply them.

    Attributes:
      mean: Mean of each output channel: float32 [out].
      variance: Variance of each output channel: float32 [out].

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.fusion import fuse
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> inputs = keras.Input((8, 8, 3))
      >>> fused = fuse(keras.Model(inputs, RepVGGBlock(4, name="block")(inputs)))
      >>> statistics = fused.pre_activation_statistics["block"]
      >>> statistics.mean.shape, statistics.variance.shape
      ((4,), (4,))
    """

    mean: np.ndarray
    variance: np.ndarray


@keras.saving.register_keras_serializable(package="tf_repvgg")
class FusedModel(keras.Model):
    """Deploy form of a model: plain Keras layers, and the statistics of the fused convolutions.

    The statistics are saved and loaded with the model. They hold for the weights that the model was fused with, and
    for no others: after training or `set_weights`, and in a fresh copy by `keras.models.clone_model`, there are none;
    they are there again once the weights are.

    `keras.Model(fused.inputs, fused.outputs)` is the same network as a plain Keras model. Saved files of that one load
    without tf_repvgg.

    Args:
      inputs: Input tensors, as for `keras.Model`.
      outputs: Output tensors, as for `keras.Model`.
      name: Name of the model.
      statistics: `PreActivationStatistics` by name of the fused convolution, or None where they are not determined.
      weights_sha256: Hash of the weights that the statistics belong to; by default, of the present weights.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.fusion import fuse
      >>> from tf_repvgg.models import Variant, build_repvgg
      >>> fused = fuse(build_repvgg(Variant(4, widths=(4,), depths=(1,), strides=(2,)), (8, 8, 3), num_classes=2))
      >>> list(fused.pre_activation_statistics)
      ['stem', 'stage1_block1']
      >>> copy = keras.models.clone_model(fused)  # with new weights
      >>> list(copy.pre_activation_statistics)
      []
    """

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        name: str | None = None,
        statistics: Mapping[str, PreActivationStatistics | None] = MappingProxyType({}),
        weights_sha256: str | None = None,
    ) -> None:
        super().__init__(inputs, outputs, name=name)
        # Not a dict: Keras would track it, and refuse to save arrays in it.
        self._statistics = MappingProxyType(dict(statistics))
        self._statistics_weights_sha256 = weights_sha256 or _hash_weights(self)

    @property
    def pre_activation_statistics(self) -> dict[str, PreActivationStatistics | None]:
        """The statistics by name of the fused convolution; empty if the weights have changed since fusion."""
        return dict(self._statistics) if self._statistics_weights_sha256 == _hash_weights(self) else {}

    def get_config(self) -> dict[str, Any]:
        statistics = {
            # As Python's floats, which JSON keeps exactly.
            name: None if entry is None else {field: array.tolist() for field, array in entry._asdict().items()}
            for name, entry in self._statistics.items()
        }
        plain = graph.recast(self, keras.Model)
        # Keras sets this while it writes the H5 format, which names the classes of layers in another way.
        plain.use_legacy_config = getattr(self, "use_legacy_config", None)
        return {
            **plain.get_config(),
            "pre_activation_statistics": statistics,
            "weights_sha256": self._statistics_weights_sha256,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> "FusedModel":
        config = dict(config)
        statistics = {
            name: None if entry is None else PreActivationStatistics(**_arrays(entry))
            for name, entry in config.pop("pre_activation_statistics").items()
        }
        weights_sha256 = config.pop("weights_sha256")
        plain = keras.Model.from_config(config, custom_objects)
        return graph.recast(plain, cls, statistics=statistics, weights_sha256=weights_sha256)


# H5 files and SavedModels name a model's class without its package.
keras.saving.get_custom_objects()[FusedModel.__name__] = FusedModel


def pre_activation_statistics(model: keras.Model) -> dict[str, PreActivationStatistics | None]:
    """Statistics of a model's fused convolutions by name; empty unless the model is a `FusedModel` with its weights.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import fusion
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> inputs = keras.Input((8, 8, 3))
      >>> model = keras.Model(inputs, RepVGGBlock(4, name="block")(inputs))
      >>> len(fusion.pre_activation_statistics(model)), len(fusion.pre_activation_statistics(fusion.fuse(model)))
      (0, 1)
    """
    return model.pre_activation_statistics if isinstance(model, FusedModel) else {}


def fuse(model: keras.Model, tolerance: float = 1e-4, check_inputs: Any = None) -> FusedModel:
    """Returns the deploy form of a model: the same function in float32, with one 3x3 convolution per block.

    Works on any functional (or built Sequential) model that contains blocks, nested models included; also on
    models of other layers, for their batch normalizations. A batch normalization after a Conv2D, Conv2DTranspose,
    SeparableConv2D, DepthwiseConv2D or Dense layer without activation is merged into that layer, as integer runtimes
    need it, even if dropout or another such normalization is between them. A SeparableConv2D becomes a
    DepthwiseConv2D named "<layer>_depthwise" and a Conv2D with the layer's name. All other layers are copied; `model`
    itself stays as it is.
    The result is then compared with `model` on random input.

    Args:
      model: Training-form model.
      tolerance: Largest accepted difference of an output, relative to the output's largest magnitude.
      check_inputs: Inputs of the comparison, in the structure of `model.inputs`; by default two random images per
        input, with 64 pixels where the height or width is not fixed.

    Returns:
      A functional model whose fused convolutions have the names of their blocks. Where blocks of several nested models
      share a name, the names of the nested models come first, as in "left_stem". The property
      `pre_activation_statistics` has an entry for each of those names.

    Raises:
      ValueError: If `model` is not functional, or has no block or normalization that can be merged.
      ArithmeticError: If an output differs by more than `tolerance`. Names the output and the measured difference.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.fusion import fuse
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> inputs = keras.Input((8, 8, 3))
      >>> fused = fuse(keras.Model(inputs, RepVGGBlock(4, name="block")(inputs)))
      >>> [(type(layer).__name__, layer.name) for layer in fused.layers[1:]]
      [('Conv2D', 'block')]
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"fuse needs a functional Keras 2 model, but got {type(model).__name__}; "
            "build it with keras.Model(inputs, outputs)"
        )
    norms = _norms_to_merge(model)
    if not (_blocks(model) or norms):
        raise ValueError(
            f"model {model.name!r} contains no re-parameterized block and no batch normalization right after a linear "
            "layer, so there is nothing to fuse"
        )
    names = graph.unique_names(model, ReparameterizedBlock)
    merged_norms = {id(norm) for layer_norms in norms.values() for norm in layer_norms}
    statistics = {}

    def replace(layer):
        if isinstance(layer, ReparameterizedBlock):
            statistics[names[id(layer)]] = _compute_statistics(layer)
            return _fuse_block(layer, names[id(layer)])
        if hidden := _blocks(layer):
            raise ValueError(
                f"block {hidden[0].name!r} is inside another layer, where it cannot be replaced; "
                "use blocks directly in functional models"
            )
        if id(layer) in norms or type(layer) is keras.layers.SeparableConv2D:
            return _merge_norms(layer, norms.get(id(layer), []))
        if id(layer) in merged_norms:
            return lambda inputs, **_: inputs
        return graph.copy_layer(layer)

    fused = graph.rebuild(model, replace)
    check_same_outputs(model, fused, tolerance, "fusing", check_inputs)
    return graph.recast(fused, FusedModel, statistics=statistics)


def needs_fusing(model: keras.Model) -> bool:
    """Whether a model holds blocks in training form.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import fusion
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> model = keras.Sequential([RepVGGBlock(4, input_shape=(8, 8, 3))])
      >>> fusion.needs_fusing(model), fusion.needs_fusing(fusion.fuse(model))
      (True, False)
    """
    return bool(_blocks(model))


def _blocks(model):
    return graph.find_layers(model, ReparameterizedBlock)


def _arrays(lists):
    return {name: np.asarray(values, np.float32) for name, values in lists.items()}


def _hash_weights(model):
    """SHA-256 of all weights by layer, whatever the order of the layers and of `model.weights`."""
    names = graph.unique_names(model)
    content = hashlib.sha256()
    for layer in sorted(graph.leaves(model), key=lambda layer: names[id(layer)]):
        for weight in layer.get_weights():
            content.update(names[id(layer)].encode())
            content.update(np.ascontiguousarray(weight).data)
    return content.hexdigest()


def _norms_to_merge(model):
    """{id of a linear layer: the batch normalizations that read its output alone, one after the other}."""
    calls = [(owner, node) for owner in graph.functional_models(model) for node in graph.nodes(owner)]
    call_counts = collections.Counter(id(node.layer) for _, node in calls)
    sources = {key: node for _, node in calls for key in node.flat_output_ids}
    norms = collections.defaultdict(list)
    merged = set()

    def find_linear_layer(owner, node):
        """The layer whose output a norm's node reads, with nothing but dropout and merged normalizations between."""
        norm = node.layer
        while True:
            (key,) = node.flat_input_ids
            node = sources.get(key)
            if node is None or graph.count_uses(owner, key) > 1 or call_counts[id(node.layer)] > 1:
                return None
            layer = node.layer
            if type(layer) in _MERGED_TYPES:
                is_linear = layer.activation is keras.activations.linear
                return layer if is_linear and list(norm.axis) == [len(layer.output_shape) - 1] else None
            if not (id(layer) in merged or isinstance(layer, _DROPOUTS)):
                return None

    for owner, node in calls:
        is_norm = isinstance(node.layer, keras.layers.BatchNormalization) and not node.call_kwargs.get("training")
        is_called_once = call_counts[id(node.layer)] == 1
        if is_norm and is_called_once and (layer := find_linear_layer(owner, node)) is not None:
            norms[id(layer)].append(node.layer)
            merged.add(id(node.layer))
    return dict(norms)


def _compute_statistics(block):
    statistics = block.pre_activation_statistics()
    if statistics is None:
        return None
    return PreActivationStatistics(*(np.asarray(values, np.float32) for values in statistics))


def _fuse_block(block, name) -> Callable:
    deploy_form = block.make_deploy_form(name)
    # The block may have been called with training=False, which a convolution does not accept.
    return lambda inputs, **_: deploy_form(inputs)


def _merge_norms(layer, norms) -> Callable:
    """A copy of a linear layer with the normalizations that follow it in its weights, as a callable."""
    weights, changes = layer.get_weights(), {}
    if norms:
        *others, kernel, bias = weights if layer.use_bias else [*weights, 0.0]
        channels = kernel.shape[-1:]
        if isinstance(layer, keras.layers.DepthwiseConv2D):  # whose output channels are the last two axes
            channels = kernel.shape[-2:]
        elif isinstance(layer, keras.layers.Conv2DTranspose):  # whose last axis is the input channels
            channels = kernel.shape[-2], 1
        for norm in norms:
            scale, shift = (np.asarray(value) for value in scale_and_shift(norm))
            kernel, bias = kernel * scale.reshape(channels), bias * scale + shift
        weights, changes = [*others, kernel, bias], {"use_bias": True}
    if type(layer) is keras.layers.SeparableConv2D:
        return split_separable_convolution(layer, f"{layer.name}_depthwise", layer.name, weights, **changes)
    return graph.copy_layer(layer, weights, **changes)


def check_same_outputs(
    model: keras.Model, other: keras.Model, tolerance: float, action: str, inputs: Any = None
) -> None:
    """Compares the outputs of a model with those of another form of it.

    Args:
      model: Functional model.
      other: Model with the inputs and outputs of `model`.
      tolerance: Largest accepted difference of an output, relative to the output's largest magnitude.
      action: What made the other model, as in "fusing", for the error.
      inputs: Inputs in the structure of `model.inputs`; by default two random images per input, or as many as its batch
        has if that is fixed, with 64 pixels where the height or width is not fixed.

    Raises:
      ArithmeticError: If an output differs by more than `tolerance`. Names the output and the measured difference.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg import fusion
      >>> model = keras.Sequential([keras.layers.ReLU(input_shape=[3])])
      >>> fusion.check_same_outputs(model, keras.models.clone_model(model), 1e-4, "cloning")
    """
    if any(layer.compute_dtype != layer.variable_dtype for layer in graph.find_layers(model) if layer is not model):
        model = graph.rebuild(model, graph.copy_layer)
    if inputs is None:
        inputs = _draw_inputs(model)
    expected, actual = (_compute_outputs(form, inputs) for form in (model, other))
    for name, expected_output, actual_output in zip(model.output_names, expected, actual, strict=True):
        largest = max(np.max(np.abs(expected_output)), np.finfo("float32").tiny)
        difference = np.max(np.abs(expected_output - actual_output)) / largest
        if not difference <= tolerance:
            raise ArithmeticError(
                f"{action} model {model.name!r} changed its output {name!r} by {difference:.2e} of its largest value, "
                f"more than the tolerance {tolerance:g}; nothing was returned"
            )


def _draw_inputs(model):
    """Random inputs in the structure of the model's: smaller ones where the model overflows, as exponentials do."""
    for magnitude in _CHECK_MAGNITUDES:
        generator = np.random.default_rng(0)
        images = [_draw_input(tensor, generator, magnitude) for tensor in model.inputs]
        inputs = graph.pack_inputs(model, images)
        if all(np.all(np.isfinite(output)) for output in _compute_outputs(model, inputs)):
            break
    return inputs


def _compute_outputs(model, inputs):
    return [np.asarray(output, np.float64) for output in tf.nest.flatten(model(inputs, training=False))]


def _draw_input(tensor, generator, magnitude):
    shape = [tensor.shape[0] or 2, *(size or _CHECK_SIZE for size in tensor.shape[1:])]
    if tensor.dtype.is_floating:
        return (magnitude * generator.standard_normal(shape)).astype(tensor.dtype.as_numpy_dtype)
    # Whole numbers are pixels if they are small, and otherwise indices, of which the first two are there in any case.
    end = int(tensor.dtype.max) + 1 if tensor.dtype.size == 1 and tensor.dtype.is_integer else 2
    return generator.integers(0, end, shape).astype(tensor.dtype.as_numpy_dtype)
