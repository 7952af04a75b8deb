"""Post-training quantization: `quantize` applies a method of `METHODS`, or several in a row, to a fused network."""

from collections.abc import Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg import fusion, graph
from tf_repvgg.quantization.activations import copy_without_rounding, quantize_activations, quantizers
from tf_repvgg.quantization.biases import make_room_for_biases
from tf_repvgg.quantization.checks import bits_by_layer, check_fused
from tf_repvgg.quantization.exportability import check_exportable
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.ptq.calibration import Calibration
from tf_repvgg.quantization.ptq.methods import METHODS, Method
from tf_repvgg.quantization.ptq.methods.dfq_data_free import check_statistics
from tf_repvgg.quantization.ptq.methods.min_max import min_max
from tf_repvgg.quantization.ptq.network import Network
from tf_repvgg.quantization.ptq.observers import find_extremes
from tf_repvgg.quantization.ptq.options import Options
from tf_repvgg.quantization.quantized_layers import QuantizedLayer, holds_float_kernel
from tf_repvgg.quantization.quantized_model import QuantizedModel
from tf_repvgg.quantization.samples import read_samples, stack_samples

__all__ = [
    "METHODS",
    "Method",
    "Network",
    "Options",
    "bits_by_layer",
    "calibrate",
    "check_data_free",
    "dequantize",
    "needs_calibration",
    "parse_method",
    "quantize",
    "quantize_network",
]


def quantize(
    model: keras.Model,
    method: str = "min_max",
    weight_bits: int | str | Mapping[str, int] = 8,
    per_channel: bool | str | Mapping[str, bool] = False,
    calibration: Any = None,
    **options: Any,
) -> QuantizedModel:
    """Quantizes a fused model after training: weights to a few bits, activations to 8 or 16.

    Args:
      model: Fused functional model (see `tf_repvgg.fusion.fuse`).
      method: Name in `METHODS`, or several in the order in which they are applied: "equalize+adaquant".
      weight_bits: Width of weights, 2 to 8, or widths by name pattern, first match wins: "stem=8,.*=4" as text or as
        {pattern: bits}.
      per_channel: Whether each output channel has a weight scale of its own, or that by name pattern:
        "stem=per_channel,.*=per_tensor" as text or as {pattern: whether it has}.
      calibration: Images as for training the model, in any form that `tf_repvgg.quantization.samples.read_samples`
        takes: an array, a list, a generator or a `tf.data.Dataset`, with or without labels and a batch dimension,
        dictionaries for several inputs; None for a method that needs none (see `needs_calibration`).
      **options: Fields of `Options`.

    Returns:
      Quantized model for `tf_repvgg.tflite.convert`. Its `quantization_notes` list what the methods left out or undid.

    Raises:
      ValueError: If the method or a name pattern is unknown, weight bits are not from 2 to 8, the model is not fused or
        not functional or holds weights that are not finite, or calibration images are missing, of another shape, not
        finite, or not normalized.
      TypeError: If an option is unknown.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3))
      >>> quantized = ptq.quantize(model, "mse", weight_bits=4, per_channel=True, calibration=images)
      >>> kernel = quantized.get_layer("conv").get_quantized_kernel()
      >>> kernel.codes.dtype, kernel.scale.shape, int(abs(kernel.codes).max())
      (dtype('int8'), (4,), 7)
    """
    network = quantize_network(model, method, weight_bits, per_channel, calibration, **options)
    return QuantizedModel.from_model(network.quantized, network.notes)


def quantize_network(
    model: keras.Model,
    method: str = "min_max",
    weight_bits: int | str | Mapping[str, int] = 8,
    per_channel: bool | str | Mapping[str, bool] = False,
    calibration: Any = None,
    **options: Any,
) -> Network:
    """Quantizes as `quantize` does, and returns both forms: the quantized one, and the float one that was rounded.

    The float form computes the same function as the model, but some methods, such as `equalize`, change its weights.

    Args:
      model: See `quantize`, as for all arguments.
      method: Name in `METHODS`, or several joined by "+".
      weight_bits: Width of weights, or widths by name pattern.
      per_channel: Whether each output channel has a weight scale of its own.
      calibration: Calibration images.
      **options: Fields of `Options`.

    Raises:
      ValueError: As `quantize`.
      TypeError: As `quantize`.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> network = ptq.quantize_network(model, calibration=np.zeros([1, 8, 8, 3]))
      >>> type(network.float.get_layer("conv")).__name__, type(network.quantized.get_layer("conv")).__name__
      ('Conv2D', 'QuantizedConv2D')
    """
    methods = parse_method(method)
    settings = Options(**options)
    check_fused(model)
    images = None
    if calibration is not None or needs_calibration(method):
        images = stack_samples(read_samples(calibration, model))
    model = lower(model)
    check_exportable(model, settings.activation_bits)
    network = Network(model, images, bits_by_layer(model, weight_bits), per_channel, settings)
    for step in methods:
        step.function(network)
    if not network.is_complete:  # after methods that only change the float form
        min_max(network)
    make_room_for_biases(network.quantized)
    if min(network.bits.values()) < 8 and (wide := _find_wide_layers(network)):
        network.notes.append(f"layers that keep weights of 8 bits: {', '.join(wide)}")
    return network


def _find_wide_layers(network):
    """The layers of the quantized form whose matrices or kernels are not quantized, among them factors of channels."""
    return [
        f"{layer.name} ({type(layer).__name__})"
        for layer in network.quantized.layers
        if layer.name not in network.layers and any(len(weight.shape) > 1 for weight in layer.weights)
    ]


def calibrate(model: keras.Model, calibration: Any) -> keras.Model:
    """Copies a fused model with quantized activations, whose ranges reach from the smallest to the largest value.

    Weights stay float; `tf_repvgg.tflite.convert` rounds them.

    Args:
      model: Fused functional model (see `tf_repvgg.fusion.fuse`).
      calibration: Calibration images, as for `quantize`.

    Returns:
      A functional model with `ActivationQuantizer`s of 8 bits.

    Raises:
      ValueError: If the model is not fused or not functional, or calibration images are missing, of another shape, not
        finite, or not normalized.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq, quantizers
      >>> model = keras.Sequential([keras.Input((8, 8, 3), name="image"), keras.layers.Conv2D(4, 3, name="conv")])
      >>> calibrated = ptq.calibrate(model, np.ones([1, 8, 8, 3]))
      >>> {quantizer.name: quantizer.range.numpy().tolist() for quantizer in quantizers(calibrated)}["image_quantizer"]
      [0.0, 1.0]
    """
    check_fused(model)
    images = Calibration(stack_samples(read_samples(calibration, model)))
    model = lower(model)
    calibrated = quantize_activations(model)
    free = {layer.name: layer for layer in quantizers(calibrated) if layer.fixed_range is None}
    for name, (minimum, maximum) in find_extremes(
        images.compute_layers(copy_without_rounding(model), list(free))
    ).items():
        free[name].set_range(minimum, maximum)
    make_room_for_biases(calibrated)
    return calibrated


def dequantize(model: keras.Model, quantized: keras.Model) -> keras.Model:
    """Makes a float model with the kernels and biases of a quantized one: a start for further training.

    Args:
      model: Fused functional model.
      quantized: Quantized form of `model`, as `quantize` returns it.

    Returns:
      A model of the layers of `model`, as `tf_repvgg.quantization.lowering.lower` rewrites them.

    Raises:
      ValueError: If `quantized` was made from another model, or `model` is not fused.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> quantized = ptq.quantize(model, weight_bits=2, calibration=np.zeros([1, 8, 8, 3]))
      >>> start = ptq.dequantize(model, quantized)
      >>> layer = start.get_layer("conv")
      >>> type(layer).__name__, len(np.unique(layer.kernel))
      ('Conv2D', 3)
    """
    check_fused(model)
    lowered = lower(model)
    names = graph.unique_names(lowered)
    quantized_layers = {layer.name: layer for layer in quantized.layers if isinstance(layer, QuantizedLayer)}

    def replace(layer):
        if not holds_float_kernel(layer):
            return graph.copy_layer(layer)
        name = names[id(layer)]
        if name not in quantized_layers:
            raise ValueError(
                f"layer {name!r} is not quantized in {quantized.name!r}; was that made from another model?"
            )
        quantized_layer = quantized_layers[name]
        weights = [weight.numpy() for weight in quantized_layer.weights if weight is not quantized_layer.scale]
        return graph.copy_layer(layer, weights)

    def declare_scale(tensor):
        # Layers that said on what scale images are may have become part of kernels (see `input_scale`).
        is_changed_image = lowered is not model and tensor.dtype.is_floating and tensor.shape.rank > 3
        return (
            keras.layers.Rescaling(1.0, name=f"{tensor.node.layer.name}_scale")(tensor) if is_changed_image else tensor
        )

    return graph.rebuild(lowered, replace, declare_scale)


dequantized = dequantize  # former name, which users' programs import


def parse_method(text: str) -> list[Method]:
    """The methods of a text such as "min_max" or "equalize+adaquant".

    Raises:
      ValueError: If a name is not in `METHODS`, or a method that changes only the float network, such as `equalize`,
        comes after one that quantizes it.

    Example:
      >>> from tf_repvgg.quantization import ptq
      >>> [method.source for method in ptq.parse_method("equalize+adaquant")]
      ['1906.04721', '2006.10518']
    """
    names = text.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"PTQ method is {name!r}; known: {', '.join(METHODS)}, and several joined by '+'")
    # What is quantized already would stay as it was.
    in_order = sorted(names, key=lambda name: METHODS[name].sets_ranges)
    if names != in_order:
        raise ValueError(
            f"PTQ method is {text!r}; methods that change the float network come first: {'+'.join(in_order)!r}"
        )
    return [METHODS[name] for name in names]


def needs_calibration(method: str) -> bool:
    """Whether a method, or any of several joined by "+", needs calibration images.

    Raises:
      ValueError: If a name is not in `METHODS`.

    Example:
      >>> from tf_repvgg.quantization import ptq
      >>> ptq.needs_calibration("dfq_data_free"), ptq.needs_calibration("dfq_data_free+bias_tune")
      (False, True)
    """
    methods = parse_method(method)
    # Where no method sets the ranges of activations, min_max does.
    return any(step.needs_calibration for step in methods) or not any(step.sets_ranges for step in methods)


def check_data_free(model: keras.Model, method: str) -> None:
    """Checks that a model holds the statistics that a method without calibration images needs.

    Args:
      model: Fused model.
      method: Name in `METHODS`, or several joined by "+".

    Raises:
      ValueError: If the method needs no calibration images and the model holds no statistics, or the method is unknown.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> ptq.check_data_free(model, "dfq")  # needs images, but no statistics
      >>> try:
      ...     ptq.check_data_free(model, "dfq_data_free")
      ... except ValueError as error:
      ...     print(str(error).partition(":")[0])
      dfq_data_free needs the statistics of the merged normalizations, and this model holds none
    """
    if not needs_calibration(method):
        check_statistics(fusion.pre_activation_statistics(model))
