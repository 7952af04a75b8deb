"""What the ways of training quantized weights share: from a fused model to one with wrapped layers, and back."""

from collections.abc import Callable, Iterable

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.activations import (
    ActivationQuantizer,
    quantize_activations,
    quantizer_before,
    quantizers,
)
from tf_repvgg.quantization.checks import check_fused, validate_images
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, QuantizedLayer, bias_of, has_quantized_form
from tf_repvgg.quantization.uniform import QuantizedKernel, at_least, min_scale_of_bias

_BATCH = 64


def check_model(model: keras.Model, also: tuple = (), in_training_form: bool = False) -> None:
    """Refuses what cannot be trained with quantized weights.

    Args:
      model: any Keras model.
      also: classes of layers with weights that are welcome beside Conv2D, DepthwiseConv2D and Dense.
      in_training_form: whether multi-branch blocks are welcome too.

    Raises:
      ValueError: if the model is not functional or not fused, or holds other layers with weights, batch normalizations
        among them; names them.
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"training with quantization needs a functional, or built Sequential, Keras 2 model, but got "
            f"{type(model).__name__}"
        )
    if not in_training_form:
        check_fused(model)
    known = (*also, *([ReparameterizedBlock] if in_training_form else []))
    for layer in graph.leaves(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            raise ValueError(
                f"layer {layer.name!r} is a BatchNormalization, which integer files do not have; "
                "tf_repvgg.fusion.fuse(model) merges those that come right after a Conv2D, DepthwiseConv2D or Dense "
                "layer without activation"
            )
        if layer.trainable_weights and not (has_quantized_form(layer) or isinstance(layer, known)):
            others = "".join(f", {its_class.__name__}" for its_class in also)
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be trained quantized; Conv2D, "
                f"DepthwiseConv2D, Dense{others} can"
            )


def wrap_layers(
    model: keras.Model,
    make_wrapper: Callable,
    activation_bits: int | None,
    range_momentum: float,
    calibration: Iterable | None,
    classes: tuple = WEIGHTED_LAYERS,
) -> keras.Model:
    """A copy of a fused model whose weighted layers are in wrappers, with quantizers on the activations if asked for.

    Args:
      model: functional deploy-form model that `check_model` accepts.
      make_wrapper: (copy of a layer, the layer's name) -> Keras layer that holds the copy as `layer`. It is called
        while the copy has its weights already, so that it can start from them.
      activation_bits: 8 or 16, or None for float activations.
      range_momentum: of their running ranges.
      calibration: None, or images for `set_ranges`.
      classes: of the layers to be wrapped.
    """
    names = graph.unique_names(model)

    def replace(layer, changes):
        copy = type(layer).from_config(layer.get_config() | {"dtype": layer.variable_dtype} | changes)
        weights = layer.get_weights()
        wrapper = make_wrapper(copy, names[id(layer)])

        def call(inputs, **keywords):
            if not copy.built:
                # Called, not built: a block's own layers have their weights only then.
                copy(keras.Input(inputs.shape[1:]))
                copy.set_weights(weights)
            return wrapper(inputs, **keywords)

        return call

    def make_quantizer(**options):
        if activation_bits is None:
            return lambda tensor: tensor
        return ActivationQuantizer(range_momentum, **options)

    found = quantize_activations(model, replace, make_quantizer, classes, activation_bits)
    if calibration is not None:
        set_ranges(found, calibration)
    return found


def set_ranges(model: keras.Model, calibration: Iterable) -> None:
    """Sets the ranges of activations to their mean over batches of calibration images; nothing else moves.

    Raises:
      ValueError: if there are none, or one has another shape or is not finite; names it.
    """
    images = validate_images(calibration, model.input_shape)
    followers = quantizers(model)
    for count, start in enumerate(range(0, len(images), _BATCH)):
        for quantizer in followers:
            quantizer.calibration_momentum = count / (count + 1)
        model(np.concatenate(images[start : start + _BATCH]), training=False)
    for quantizer in followers:
        quantizer.calibration_momentum = None


def strip_wrappers(model: keras.Model, wrapper_class: type) -> keras.Model:
    """The model with `wrapper.strip()` in place of every wrapper: a callable on tensors, of a `QuantizedLayer`.

    Raises:
      ValueError: if there is no such wrapper.
    """
    find_wrappers(model, wrapper_class)
    found = graph.rebuild(
        model, lambda layer: layer.strip() if isinstance(layer, wrapper_class) else graph.copy_layer(layer)
    )
    make_room_for_biases(found)
    return found


def find_wrappers(model: keras.Model, wrapper_class: type) -> list:
    """The wrappers of the model; raises ValueError if there are none."""
    found = graph.find_layers(model, wrapper_class)
    if not found:
        raise ValueError(
            f"model {model.name!r} holds nothing that {wrapper_class.stripped_by} strips; was it made for training?"
        )
    return found


def make_room_for_biases(model: keras.Model) -> None:
    """Raises scales at which a bias would overflow: those of channels that are zero but for the bias, or nearly."""
    if quantizers(model):
        for layer in graph.find_layers(model):
            if isinstance(layer, QuantizedLayer):
                _make_room_for_bias(layer)


def _make_room_for_bias(layer):
    quantized = layer.quantized_kernel()
    smallest = min(quantizer_before(node.keras_inputs[0]).scale() for node in layer.inbound_nodes)
    scale = at_least(quantized.scale, min_scale_of_bias(bias_of(layer), smallest))
    if np.any(scale != quantized.scale):
        codes = np.where(scale == quantized.scale, quantized.codes, np.round(quantized.dequantize() / scale))
        layer.set_quantized_kernel(QuantizedKernel(codes.astype(np.int8), scale))
