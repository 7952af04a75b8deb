"""What the methods of quantization-aware training share: wrapping the layers of a fused model, and stripping them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import quantize_activations, quantizers
from tf_repvgg.quantization.biases import make_room_for_biases
from tf_repvgg.quantization.checks import check_fused
from tf_repvgg.quantization.exportability import check_exportable
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, is_quantizable, name_weighted_layers
from tf_repvgg.quantization.samples import read_samples, stack_samples

_BATCH = 64


class TrainingWrapper(keras.layers.Wrapper):
    """Base of the Keras wrappers whose layer trains with quantized weights.

    Attributes:
      stripped_by: Name of the function of `tf_repvgg.quantization` that strips these wrappers from a model.
    """

    stripped_by: str

    def strip(self) -> Callable:
        """Makes the replacement of the wrapper in the stripped model, a callable on tensors."""
        raise NotImplementedError(f"{type(self).__name__} does not define strip()")


def check_model(model: keras.Model, other_classes: tuple[type, ...] = (), accept_training_form: bool = False) -> None:
    """Refuses models that cannot be trained with quantized weights.

    Args:
      model: Any Keras model.
      other_classes: Classes of layers with weights to accept beside `WEIGHTED_LAYERS` and Embedding.
      accept_training_form: Whether to accept multi-branch blocks.

    Raises:
      ValueError: If the model is not functional or not fused, or has other layers with weights, batch normalizations
        included. The message names the layer.
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"training with quantization needs a functional, or built Sequential, Keras 2 model, but got "
            f"{type(model).__name__}"
        )
    if not accept_training_form:
        check_fused(model)
    # The table of an Embedding is rounded on the grid of its output.
    accepted = (*other_classes, keras.layers.Embedding, *([ReparameterizedBlock] if accept_training_form else []))
    for layer in graph.leaves(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            raise ValueError(
                f"layer {layer.name!r} is a BatchNormalization, which integer files do not have; "
                "tf_repvgg.fusion.fuse(model) merges those that come right after a "
                f"{name_weighted_layers('or')} layer without activation"
            )
        if layer.trainable_weights and not (is_quantizable(layer) or isinstance(layer, accepted)):
            names = [*(weighted.__name__ for weighted in WEIGHTED_LAYERS), *(other.__name__ for other in other_classes)]
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be trained with quantization; "
                f"{', '.join(names[:-1])} and {names[-1]} can"
            )


def prepare_model(
    model: keras.Model,
    calibration: Any,
    other_classes: tuple[type, ...] = (),
    accept_training_form: bool = False,
) -> tuple[keras.Model, list[np.ndarray] | None]:
    """Lowers a model, and reads its calibration images; refuses what cannot be trained with quantized weights.

    Args:
      model: Any Keras model.
      calibration: Calibration images, as `read_samples` takes them, or None.
      other_classes: Classes of layers with weights to accept, as for `check_model`.
      accept_training_form: Whether to accept multi-branch blocks.

    Returns:
      The model as `tf_repvgg.quantization.lowering.lower` rewrites it; and an array [count, ...] for each of its
      inputs, or None.

    Raises:
      ValueError: As `check_model`, and for bad calibration images.
    """
    if not accept_training_form:
        check_fused(model)
    lowered = lower(model)
    check_model(lowered, other_classes, accept_training_form)
    # The scale of the images is that with which the model itself starts, before constants were folded.
    return lowered, None if calibration is None else stack_samples(read_samples(calibration, model))


def wrap_layers(
    model: keras.Model,
    make_wrapper: Callable[[keras.layers.Layer, str], TrainingWrapper],
    activation_bits: int | None,
    range_momentum: float,
    inputs: Sequence[np.ndarray] | None,
    classes: tuple[type, ...] = WEIGHTED_LAYERS,
) -> keras.Model:
    """Copies a fused model, with its weighted layers in wrappers and, if requested, quantizers on its activations.

    Args:
      model: Functional deploy-form model, as `prepare_model` returns it.
      make_wrapper: Function (copy of a layer, name of the layer) -> wrapper that holds the copy as `layer`. The copy
        has its weights before the wrapper is built, so that the wrapper can start from them.
      activation_bits: Bits of activations, 8 or 16; None leaves activations in float.
      range_momentum: Momentum of the running ranges, from 0 to 1.
      inputs: Inputs for `set_ranges`; None leaves the ranges unset.
      classes: Classes of the layers to be wrapped.

    Returns:
      A functional model, not compiled.
    """
    if activation_bits is not None:
        check_exportable(model, activation_bits)
    names = graph.unique_names(model)

    def replace(layer, changes):
        copy = type(layer).from_config(layer.get_config() | {"dtype": layer.variable_dtype} | changes)
        weights = layer.get_weights()
        wrapper = make_wrapper(copy, names[id(layer)])

        def call(inputs, **keywords):
            if not copy.built:
                # Called instead of built: only then do the layers inside of a block have weights.
                copy(keras.Input(inputs.shape[1:]))
                copy.set_weights(weights)
            return wrapper(inputs, **keywords)

        return call

    def make_quantizer(**options):
        if activation_bits is None:
            return lambda tensor: tensor
        return ActivationQuantizer(range_momentum, **options)

    bits = {} if activation_bits is None else {"bits": activation_bits}
    wrapped = quantize_activations(model, replace, make_quantizer, classes, **bits)
    if inputs is not None and quantizers(wrapped):
        set_ranges(wrapped, inputs)
    return wrapped


def set_ranges(model: keras.Model, inputs: Sequence[np.ndarray]) -> None:
    """Sets activation ranges to their mean over batches of 64 calibration images; no other variable changes.

    Args:
      model: Model with `ActivationQuantizer`s.
      inputs: An array [count, ...] for each of `model.inputs`.
    """
    model_quantizers = quantizers(model)
    size = model.inputs[0].shape[0]

    def run(start, end, momentum):
        for quantizer in model_quantizers:
            quantizer.calibration_momentum = momentum
        model(graph.pack_inputs(model, [values[start:end] for values in inputs]), training=False)
        return np.stack([quantizer.range.numpy() for quantizer in model_quantizers])

    means: Any = 0.0
    for count, start in enumerate(range(0, len(inputs[0]), _BATCH)):
        end = min(start + _BATCH, len(inputs[0]))
        if size is None:
            means = run(start, end, count / (count + 1))
            continue
        # A model that computes smaller batches only: the range of a batch is that of all its parts.
        parts = np.stack([run(part, part + size, 0.0) for part in range(start, end, size)])
        batch = np.stack([parts[..., 0].min(axis=0), parts[..., 1].max(axis=0)], axis=-1)
        means = means + (batch - means) / (count + 1)
    for quantizer, mean in zip(model_quantizers, means, strict=True):
        quantizer.calibration_momentum = None
        quantizer.range.assign(mean)


def strip_wrappers(model: keras.Model, wrapper_class: type[TrainingWrapper]) -> keras.Model:
    """Copies a model, with the result of `wrapper.strip()` in place of every wrapper.

    Args:
      model: Functional model.
      wrapper_class: Class of the wrappers to be stripped.

    Returns:
      A functional model without these wrappers.

    Raises:
      ValueError: If the model has no such wrapper.
    """
    find_wrappers(model, wrapper_class)
    stripped = graph.rebuild(
        model, lambda layer: layer.strip() if isinstance(layer, wrapper_class) else graph.copy_layer(layer)
    )
    make_room_for_biases(stripped)
    return stripped


def find_wrappers(model: keras.Model, wrapper_class: type[TrainingWrapper]) -> list[Any]:
    """Finds the wrappers of a model.

    Args:
      model: Any Keras model.
      wrapper_class: Class of the wrappers.

    Returns:
      At least one wrapper.

    Raises:
      ValueError: If there are none.
    """
    wrappers = graph.find_layers(model, wrapper_class)
    if not wrappers:
        raise ValueError(
            f"model {model.name!r} holds nothing that {wrapper_class.stripped_by} strips; was it made for training?"
        )
    return wrappers
