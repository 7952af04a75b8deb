"""Random small functional models of a few dozen kinds of layers, drawn from their seed alone.

A model is a chain of parts (`parts.PARTS`) with a head (`heads.HEADS`); some models have two inputs, two outputs,
pixels as inputs, or a fixed batch.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from harness.any_model.drawing import Drawing
from harness.any_model.heads import HEADS
from harness.any_model.parts import PARTS
from tf_repvgg import graph

L = keras.layers

_MOST_ATTEMPTS = 50
# Outputs that hardly depend on the image, or are nothing but rounding errors or overflows, say nothing about a file.
_SMALLEST_SPREAD, _SMALLEST_OUTPUT, _LARGEST_OUTPUT = 0.05, 1e-3, 1e4


class RandomModel(NamedTuple):
    """A model and images for it.

    Attributes:
      model: Functional model, in training form where it holds blocks.
      inputs: Float32 images [count, height, width, channels], one array for each input.
      parts: Names of its parts and of its head.
      outputs: Outputs of the model on the images, each [count, ...].
    """

    model: keras.Model
    inputs: list[np.ndarray]
    parts: list[str]
    outputs: list[np.ndarray]


def make_random_model(seed: int, images: int = 48) -> RandomModel:
    """Draws a model whose outputs are finite and depend on the image.

    Args:
      seed: Seed of everything.
      images: Number of images.

    Raises:
      RuntimeError: If no such model comes up in many attempts.
    """
    for attempt in range(_MOST_ATTEMPTS):
        keras.utils.set_random_seed(1000 * seed + attempt)
        drawn = _draw(Drawing(seed, attempt), images)
        if all(map(_is_informative, drawn.outputs)):
            return drawn
    raise RuntimeError(f"seed {seed} gives no model whose outputs are finite and depend on the image")


def run_model(model: keras.Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a model on images, each [count, ...], in the order of `tf.nest.flatten`.

    Args:
      model: Functional model.
      inputs: One array [count, ...] for each input.
    """
    batch = model.inputs[0].shape[0] or len(inputs[0])
    parts = []
    for start in range(0, len(inputs[0]), batch):
        tensors = [tf.constant(array[start : start + batch]) for array in inputs]
        outputs = model(graph.pack_inputs(model, tensors), training=False)
        parts.append([output.numpy() for output in tf.nest.flatten(outputs)])
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _draw(draw, count):
    size = draw.choose([8, 9, 12]), draw.choose([8, 10]), draw.choose([3, 4])
    has_pixels, batch = draw.decide(0.08), 1 if draw.decide(0.05) else None
    tensors = [keras.Input(size, batch, name=f"image_{index}") for index in range(2 if draw.decide(0.12) else 1)]
    names = [draw.choose(sorted(PARTS)) for _ in range(draw.generator.integers(2, 6))]
    features = L.Concatenate()(tensors) if len(tensors) > 1 else tensors[0]
    if has_pixels:
        features = draw.choose([lambda x: L.Rescaling(1 / 127.5, -1.0)(x), lambda x: x / 255.0])(features)
    for name in names:
        features = PARTS[name](draw, features)
    names.append(draw.choose(sorted(HEADS)))
    outputs = HEADS[names[-1]](draw, features, "first")
    if draw.decide(0.15):
        second = L.Conv2D(2, 1, name="second")(features)
        outputs = {"a": outputs, "b": second} if draw.decide(0.5) else [outputs, second]
    model = keras.Model(tensors if len(tensors) > 1 else tensors[0], outputs)
    low, high = (0, 255) if has_pixels else (-1, 1)
    inputs = [draw.generator.uniform(low, high, (count, *size)).astype("float32") for _ in tensors]
    _fill_weights(model, inputs, draw.generator)
    return RandomModel(model, inputs, names, run_model(model, inputs))


def _fill_weights(model, inputs, generator):
    """Draws biases, gammas and betas, and takes the statistics of batch normalizations from the images."""
    norms = graph.find_layers(model, L.BatchNormalization)
    for norm in norms:
        norm.momentum = 0.0
        if norm.scale:
            norm.gamma.assign(generator.uniform(0.5, 1.5, norm.gamma.shape))
        if norm.center:
            norm.beta.assign(generator.normal(0, 0.3, norm.beta.shape))
    for layer in graph.find_layers(model, (L.Conv2D, L.Conv1D, L.DepthwiseConv2D, L.Dense)):
        if layer.use_bias:
            layer.bias.assign(generator.normal(0, 0.3, layer.bias.shape))
    # Each pass settles the normalizations whose inputs the pass before has settled.
    batch = model.inputs[0].shape[0] or len(inputs[0])
    for _ in range(3 if norms else 0):
        model(graph.pack_inputs(model, [array[:batch] for array in inputs]), training=True)


def _is_informative(output):
    if not np.all(np.isfinite(output)):
        return False
    largest = float(np.max(np.abs(output)))
    spread = float(np.max(np.std(output, axis=0)))
    return _SMALLEST_OUTPUT < largest < _LARGEST_OUTPUT and spread > _SMALLEST_SPREAD * largest
