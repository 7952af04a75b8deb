"""Post-training quantization: `quantize` applies one method of `METHODS`, or several in a row, to a fused network."""

from collections.abc import Mapping

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import ACTIVATION_BITS
from tf_repvgg.quantization.checks import check_fused, validate_images, values_by_layer
from tf_repvgg.quantization.ptq.methods import METHODS, Method
from tf_repvgg.quantization.ptq.methods.dfq_data_free import check_statistics
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network, Options
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, QuantizedLayer

# Normalised images are within a few units of zero; pixels of 0 to 255 are not.
_LARGEST_INPUT = 32.0

__all__ = [
    "METHODS",
    "Method",
    "Network",
    "Options",
    "bits_by_layer",
    "check_data_free",
    "dequantized",
    "needs_calibration",
    "parse_method",
    "quantize",
    "quantized_network",
]


def quantize(
    model: keras.Model,
    method: str = "min_max",
    weight_bits: int | str | Mapping[str, int] = 8,
    per_channel: bool = False,
    calibration=None,
    **options,
) -> keras.Model:
    """Quantizes a fused model after training: weights to a few bits, activations to 8 or 16.

    Args:
      model: fused functional model with one input (see `tf_repvgg.fusion.fuse`).
      method: a name in `METHODS`, or several in the order in which they are applied, as in "equalize+adaquant".
      weight_bits: 2 to 8, or {pattern of layer names: bits}, first match wins; also as text, "stem=8,.*=4".
      per_channel: one weight scale per output channel, or one per tensor.
      calibration: iterable of normalised float images [height, width, channels], without a batch dimension; None for
        a method that needs none (see `needs_calibration`).
      **options: fields of `Options`.

    Returns:
      A Keras model of `QuantizedLayer`s and `ActivationQuantizer`s, for `tf_repvgg.tflite.convert`. Its attribute
      `quantization_notes` lists what the methods did not or not fully do. (Keras does not save that attribute.)

    Raises:
      ValueError: for an unknown method, bits outside 2..8, patterns that match no layer, a model that is not fused or
        not functional or has weights that are not finite, and for calibration images that are none, of another shape,
        not finite, or not normalised.
      TypeError: for an unknown option.
    """
    network = quantize_network(model, method, weight_bits, per_channel, calibration, **options)
    network.quantized.quantization_notes = tuple(network.notes)
    return network.quantized


def quantize_network(model, method="min_max", weight_bits=8, per_channel=False, calibration=None, **options) -> Network:
    """As `quantize`, but with the float form beside the quantized one: the weights that were rounded.

    They make the same function as the model's own, but are others after `equalize`.
    """
    methods = parse_method(method)
    options = _checked_options(Options(**options))
    check_fused(model)
    images = None
    if calibration is not None or needs_calibration(method):
        images = _normalised(validate_images(() if calibration is None else calibration, model.input_shape))
    network = Network(model, images, bits_by_layer(model, weight_bits), per_channel, options)
    for step in methods:
        step.function(network)
    if not network.is_complete:  # after methods that only change the float form
        min_max(network)
    return network


def dequantized(model: keras.Model, quantized: keras.Model) -> keras.Model:
    """A fused model with the kernels and biases of its quantized form, in float: what further training starts from.

    Args:
      model: fused functional model.
      quantized: what `quantize` made of it.

    Raises:
      ValueError: if it is not, and for a model that is not fused.
    """
    check_fused(model)
    names = graph.unique_names(model)
    forms = {layer.name: layer for layer in quantized.layers if isinstance(layer, QuantizedLayer)}

    def replace(layer):
        if not isinstance(layer, WEIGHTED_LAYERS):
            return graph.copy_layer(layer)
        name = names[id(layer)]
        if name not in forms:
            raise ValueError(f"layer {name!r} is not quantized in {quantized.name!r}; was that made of another model?")
        form = forms[name]
        return graph.copy_layer(layer, [weight.numpy() for weight in form.weights if weight is not form.scale])

    return graph.rebuild(model, replace)


def parse_method(text: str) -> list[Method]:
    """The methods of "min_max" or "equalize+adaquant".

    Raises:
      ValueError: for a name that is not in `METHODS`.
    """
    for name in text.split("+"):
        if name not in METHODS:
            raise ValueError(f"PTQ method is {name!r}; known: {', '.join(METHODS)}, and several joined by '+'")
    return [METHODS[name] for name in text.split("+")]


def needs_calibration(method: str) -> bool:
    """Whether a method, or any of several joined by "+", looks at calibration images."""
    methods = parse_method(method)
    # Where none sets the ranges of activations, min_max does.
    return any(step.needs_calibration for step in methods) or not any(step.sets_ranges for step in methods)


def check_data_free(model: keras.Model, method: str) -> None:
    """Raises ValueError if a method needs no calibration images, but statistics that the model does not hold."""
    if not needs_calibration(method):
        check_statistics(getattr(model, "pre_activation_statistics", {}))


def bits_by_layer(model: keras.Model, weight_bits) -> dict[str, int]:
    """{layer name: bits} of a model's Conv2D, DepthwiseConv2D and Dense layers; see `tf_repvgg.quantization.by_layer`.

    Raises:
      ValueError: as `by_layer`, for bits outside 2..8.
    """
    return values_by_layer(model, weight_bits, "weight bits", 2, 8)


def _normalised(images):
    """A list of batches as one array."""
    if (largest := max(float(np.max(np.abs(image))) for image in images)) > _LARGEST_INPUT:
        raise ValueError(
            f"calibration images reach {largest:g}, as pixels do; they must be normalised as the model was trained"
        )
    if len({image.shape for image in images}) > 1:
        raise ValueError("calibration images differ in size; give all of them one")
    return np.concatenate(images)


def _checked_options(options):
    low, high = options.input_range
    if not -_LARGEST_INPUT <= low < high <= _LARGEST_INPUT:
        raise ValueError(f"input_range is {options.input_range!r}; it must be (lowest, highest) of normalised images")
    if not 50 < options.percentile <= 100:
        raise ValueError(f"percentile is {options.percentile!r}; it must be above 50, and at most 100")
    if options.activation_bits not in ACTIVATION_BITS:
        raise ValueError(
            f"activation bits are {options.activation_bits!r}; known: {', '.join(map(str, ACTIVATION_BITS))}"
        )
    if options.iterations < 1:
        raise ValueError(f"iterations are {options.iterations!r}; they must be 1 or more")
    return options
