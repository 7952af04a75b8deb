"""How far each layer of an integer file is from the float model that it was made of."""

import dataclasses

import numpy as np
import tf_keras as keras

from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, kernel_of
from tf_repvgg.tflite import flatbuffer, interpreter, reader

_LARGEST_CODEBOOK = 32


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """One layer with weights.

    Attributes:
      layer: its name in the float model.
      codes_used: distinct codes; of weights with a scale for each channel, of the channel with the most.
      weight_bits: of an index that tells so many codes apart.
      weights: their number.
      entropy_bits: of the distribution of its codes, in bits per weight.
      weight_sqnr_db: signal to quantization noise of the weights, 10 log10(sum w^2 / sum (w - w_q)^2); None where
        there is no noise, or nothing to compare with.
      activation_sqnr_db: the same of the layer's output, with all the noise of the layers before it; None for layers
        of nested models, and ones that are called more than once, too.
      codebook: the distinct weights, if there is one scale and they are few and not on a grid of few bits; else None.
    """

    layer: str
    codes_used: int
    weight_bits: int
    weights: int
    entropy_bits: float
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    codebook: list[float] | None


def layers(file: bytes, model: keras.Model, images) -> list[LayerFidelity]:
    """Compares a file, layer by layer, with the model whose weights were rounded.

    Args:
      file: integer file of batch 1.
      model: fused float model; or the quantized model that was trained, with which there is nothing to compare.
      images: float32 [count, height, width, channels], normalised: what activations are compared on.

    Returns:
      An entry for each operator with weights, in execution order. An operator belongs to the layer whose kernel points
      the way its weights do, as names do not survive every conversion.
    """
    flat = flatbuffer.unpack(file)
    graph = flat.subgraphs[0]
    candidates = graph.find_layers(model, WEIGHTED_LAYERS)
    is_float = not quantizers(model)
    found = []
    for operator in graph.operators:
        if (layout := flatbuffer.weights_layout(flat, operator)) is not None:
            weights = flatbuffer.weights_tensor(graph, operator)
            codes, scale = flatbuffer.weight_codes(flat, weights, layout), np.asarray(weights.quantization.scale)
            layer = _likest(codes * scale, candidates)
            found.append((layer, int(operator.outputs[0]), codes, scale))
    sqnr = _activation_sqnr(file, model, {layer: output for layer, output, *_ in found}, images) if is_float else {}
    return [
        LayerFidelity(
            layer=layer.name,
            codes_used=(states := reader.distinct_codes(codes, len(scale) > 1)),
            weight_bits=max(1, int(np.ceil(np.log2(states)))),
            weights=int(codes.size),
            entropy_bits=round(reader.entropy_bits(codes), 3),
            weight_sqnr_db=sqnr_db(kernel_of(layer), codes * scale) if is_float else None,
            activation_sqnr_db=sqnr.get(layer),
            codebook=_codebook(codes, scale),
        )
        for layer, _, codes, scale in found
    ]


def sqnr_db(signal, approximation) -> float | None:
    """Signal to quantization noise in decibels; None without noise or signal."""
    power, noise = np.sum(np.square(signal, dtype=np.float64)), np.sum(np.square(signal - approximation, dtype=float))
    return round(float(10 * np.log10(power / noise)), 2) if power and noise else None


def _likest(weights, layers):
    """The layer whose kernel is of that shape and points the same way."""

    def cosine(layer):
        kernel = kernel_of(layer)
        length = np.linalg.norm(kernel) * np.linalg.norm(weights)
        return np.vdot(kernel, weights) / length if length else 0.0

    return max((layer for layer in layers if kernel_of(layer).shape == weights.shape), key=cosine)


def _codebook(codes, scale):
    values = np.unique(codes).astype(int)
    # Codes of a uniform grid of so few levels would lie near zero.
    is_codebook = len(scale) == 1 and len(values) <= _LARGEST_CODEBOOK < np.max(np.abs(values))
    return [float(value * scale[0]) for value in values] if is_codebook else None


def _activation_sqnr(file, model, outputs, images):
    """{layer: decibels} of the layers that have one output in the model's own graph."""
    outputs = {
        layer: index
        for layer, index in outputs.items()
        if any(layer is own for own in model.layers) and len(layer.inbound_nodes) == 1
    }
    if not outputs:
        return {}
    expected = keras.Model(model.inputs, [layer.output for layer in outputs]).predict_on_batch(images)
    expected = expected if isinstance(expected, list) else [expected]
    computed = interpreter.intermediate(file, images, list(outputs.values()))
    return {layer: sqnr_db(*pair) for layer, pair in zip(outputs, zip(expected, computed, strict=True), strict=True)}
