"""Distance of each layer of an integer file from the float model that it was made from."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, kernel_of
from tf_repvgg.quantization.uniform import QuantizedKernel
from tf_repvgg.tflite import flatbuffer, interpreter, reader
from tf_repvgg.tflite.weights import layer_names

_LARGEST_CODEBOOK = 32


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """Fidelity of one operator with weights.

    Attributes:
      layer: Name of its layer in the float model, as in the file (see `tf_repvgg.tflite.with_weights`).
      codes_used: Number of distinct codes; if each channel has a scale, that of the channel with the most.
      weight_bits: Bits of an index that distinguishes so many codes.
      weights: Number of weights.
      entropy_bits: Entropy of the distribution of its codes, in bits per weight.
      weight_sqnr_db: Signal to quantization noise ratio of the weights in dB, 10 log10(sum w^2 / sum (w - w_q)^2); None
        if there is no noise, or no float model to compare with.
      activation_sqnr_db: The same ratio of the layer's output, with the noise of all layers before it; None also for
        layers of nested models and layers that are called more than once.
      codebook: The distinct weights, if there is one scale and they are few and not on a grid of few bits; else None.

    Example:
      >>> from tf_repvgg.tflite import LayerFidelity
      >>> stem = LayerFidelity("stem", 15, 4, 432, 3.1, 20.5, 19.0, None)
      >>> stem.layer, stem.weight_bits
      ('stem', 4)
    """

    layer: str
    codes_used: int
    weight_bits: int
    weights: int
    entropy_bits: float
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    codebook: list[float] | None


class _Operator(NamedTuple):
    layer: keras.layers.Layer
    kernel: QuantizedKernel
    output: int


def layers(file: bytes, model: keras.Model, images: np.ndarray) -> list[LayerFidelity]:
    """Compares a file, layer by layer, with the model whose weights were rounded.

    Args:
      file: Integer file of batch 1 whose weights are named after the layers of the model, as `with_weights` does.
      model: Fused float model, compared in the form that `tf_repvgg.quantization.lowering.lower` gives it; or the
        quantized model that was trained, which gives no ratios.
      images: Normalized images on which activations are compared, float32 [count, height, width, channels].

    Returns:
      An entry for each operator with weights, in execution order.

    Raises:
      ValueError: If weights of the file are not named after a layer of the model, or have another shape.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> images = np.random.default_rng(0).uniform(-1, 1, [4, 8, 8, 3]).astype(np.float32)
      >>> file = tflite.convert(model, images, per_channel=False, weight_bits=4)
      >>> (layer,) = tflite.layers(file, model, images)
      >>> layer.layer, layer.weight_bits, layer.weights, layer.weight_sqnr_db > 10
      ('conv', 4, 108, True)
    """
    if not quantizers(model):
        with contextlib.suppress(graph.CopyError):  # then the file was made from the model as it is
            model = lower(model)
    names = layer_names(model)
    operators = _read_operators(file, model, names)
    is_float = not quantizers(model)
    activation_sqnr = _activation_sqnr_db(file, model, operators, images) if is_float else {}
    return [
        LayerFidelity(
            layer=names[id(layer)],
            codes_used=(count := reader.distinct_codes(kernel.codes, len(kernel.scale) > 1)),
            weight_bits=max(1, int(np.ceil(np.log2(count)))),
            weights=int(kernel.codes.size),
            entropy_bits=round(reader.entropy_bits(kernel.codes), 3),
            weight_sqnr_db=sqnr_db(kernel_of(layer), kernel.codes * kernel.scale) if is_float else None,
            activation_sqnr_db=activation_sqnr.get(id(layer)),
            codebook=_read_codebook(kernel),
        )
        for layer, kernel, _ in operators
    ]


def sqnr_db(signal: np.ndarray, approximation: np.ndarray) -> float | None:
    """Signal to quantization noise ratio in dB; None without noise or signal."""
    power, noise = np.sum(np.square(signal, dtype=np.float64)), np.sum(np.square(signal - approximation, dtype=float))
    return round(float(10 * np.log10(power / noise)), 2) if power and noise else None


def _read_operators(file: bytes, model: keras.Model, names: Mapping[int, str]) -> list[_Operator]:
    """The operators of a file that have weights, with their layers."""
    layers_by_name = {names[id(layer)]: layer for layer in graph.find_layers(model, WEIGHTED_LAYERS)}
    flat = flatbuffer.unpack(file)
    subgraph = flat.subgraphs[0]
    operators: list[_Operator] = []
    unnamed: list[str] = []
    for operator in subgraph.operators:
        if (layout := flatbuffer.weights_layout(flat, operator)) is None:
            continue
        tensor = flatbuffer.weights_tensor(subgraph, operator)
        if not flatbuffer.is_constant(flat, tensor):
            continue
        kernel = QuantizedKernel(
            flatbuffer.weight_codes(flat, tensor, layout), np.asarray(tensor.quantization.scale, np.float32)
        )
        layer = layers_by_name.get(flatbuffer.weights_layer_name(tensor) or "")
        if layer is None:
            unnamed.append(flatbuffer.tensor_name(tensor))
            continue
        if kernel_of(layer).shape != kernel.codes.shape:
            raise ValueError(
                f"the file's weights {flatbuffer.tensor_name(tensor)!r} have shape {kernel.codes.shape}, and those of "
                f"the model's layer {kernel_of(layer).shape}; is the file of another model?"
            )
        operators.append(_Operator(layer, kernel, int(operator.outputs[0])))
    # A product with a matrix that is no layer's has the converter's name; but then every layer is found.
    if unnamed and len({id(operator.layer) for operator in operators}) < len(layers_by_name):
        raise ValueError(
            f"the file's weights {unnamed[0]!r} are not named after a layer of the model; tf_repvgg.tflite.convert and "
            "with_weights write files with weights that are named <layer>/kernel"
        )
    return operators


def _read_codebook(kernel):
    values = np.unique(kernel.codes).astype(int)
    # The codes of a uniform grid with so few levels would lie near zero.
    is_codebook = len(kernel.scale) == 1 and len(values) <= _LARGEST_CODEBOOK < np.max(np.abs(values))
    return [float(value * kernel.scale[0]) for value in values] if is_codebook else None


def _activation_sqnr_db(file, model, operators, images):
    """{id of a layer: decibels} of the layers that have one output in the model's own graph."""
    single = [
        operator
        for operator in operators
        if any(operator.layer is layer for layer in model.layers) and len(operator.layer.inbound_nodes) == 1
    ]
    if not single:
        return {}
    outputs = keras.Model(model.inputs, [operator.layer.output for operator in single]).predict_on_batch(images)
    expected = outputs if isinstance(outputs, list) else [outputs]
    actual = interpreter.intermediate(file, images, [operator.output for operator in single])
    return {
        id(operator.layer): sqnr_db(*activations)
        for operator, activations in zip(single, zip(expected, actual, strict=True), strict=True)
    }
