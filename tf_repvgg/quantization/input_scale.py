"""The scale of images, compared with what a model itself starts with: pixels, or images normalized beforehand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion, graph
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, apply_kernel, bias_of, kernel_of

# Normalized images are within a few units of zero; pixels from 0 to 255 are not.
LARGEST_INPUT = 32.0
# Pixels from which a mean was taken have both signs and stay below this.
_LARGEST_CENTERED_INPUT = 256.0
# A model that starts with pixels divides them by at least this (58 by the standard deviation of ImageNet, 255 at most
# in 8 bits), and images all of which lie within so many units are not pixels, unless all are of one color.
_SMALLEST_DIVISOR = 16.0
# Standard deviations of a layer's outputs may differ by this factor from those in training: statistics of branches
# that add up are approximate, and so are those of a few images.
_LARGEST_RATIO = 8.0


def check_scale(samples: Sequence[Sequence[np.ndarray]], model: keras.Model) -> None:
    """Refuses calibration images that are pixels where the model takes normalized images, or the other way around.

    Inputs of integer types take whatever their type holds, and so do models with a Rescaling by 1. Other images
    (height, width and channels, or whatever is larger) go through the layers that come before the first weights, such
    as Rescaling, Normalization and operators. What arrives there must not be pixels, unless the statistics of fused
    normalizations say that it was in training; and it must not be images that a division meant for pixels has made
    uniform.

    Args:
      samples: Samples, each with an array [1, ...] for each input.
      model: Functional model.

    Raises:
      ValueError: If images are on the wrong scale. The message names the layer that they come to.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.input_scale import check_scale
      >>> layers = [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3, name="stem")]
      >>> pixels = [[np.full([1, 8, 8, 3], 255.0, np.float32)]]
      >>> check_scale(pixels, keras.Sequential(layers))
      >>> try:
      ...     check_scale(pixels, keras.Sequential([layers[0], layers[-1]]))
      ... except ValueError as error:
      ...     print(str(error).partition(";")[0])
      calibration images reach 255, as pixels do, and layer 'stem' takes them like that
    """
    for position, tensor in enumerate(model.inputs):
        if not tensor.dtype.is_floating or len(tensor.shape) < 4:
            continue
        images = [sample[position] for sample in samples]
        low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
        if max(-low, high) > LARGEST_INPUT:
            if not any(map(_is_declaration, graph.find_layers(model, keras.layers.Rescaling))):
                _check_pixels(samples, model)
        elif 0 < high - low <= _SMALLEST_DIVISOR and any(_is_normalized(image) for image in images):
            _check_normalized(samples, model, position, low, high)


def _is_normalized(image):
    return np.min(image) < 0 or np.any(image != np.round(image))


def _is_declaration(rescaling):
    """Whether a layer computes nothing, and is there to say that the model takes images as they are."""
    return np.all(np.equal(rescaling.scale, 1)) and np.all(np.equal(rescaling.offset, 0))


def _holds_weights(layer):
    """Whether a layer has kernels; normalizations have one weight for each channel."""
    return not isinstance(layer, keras.layers.Normalization) and any(len(weight.shape) > 1 for weight in layer.weights)


def _compute_arrivals(samples, model) -> dict[str, tuple[keras.layers.Layer, list[np.ndarray]]]:
    """{name of a layer: (the layer, what comes to it from each sample)} of the first layers with weights."""
    arrivals: dict[str, tuple[keras.layers.Layer, list[np.ndarray]]] = {}
    for sample in samples:
        _run_to_weights(model, [tf.constant(array) for array in sample], arrivals)
    return arrivals


def _run_to_weights(model, inputs, arrivals) -> list[Any]:
    """Runs the layers that depend on no weights, and returns the outputs of the model among them, or None."""
    tensors = {str(id(tensor)): values for tensor, values in zip(model.inputs, inputs, strict=True)}
    for node in graph.nodes(model):
        keys, layer = node.flat_input_ids, node.layer
        if any(key not in tensors for key in keys):
            continue
        if _holds_weights(layer) and not graph.is_functional(layer):
            if (values := tensors[keys[0]]).dtype.is_floating:
                arrivals.setdefault(layer.name, (layer, []))[1].append(values.numpy())
            continue
        arguments, keywords = node.map_arguments({key: [tensors[key]] * len(keys) for key in keys})
        if graph.is_functional(layer):
            outputs = _run_to_weights(layer, [tensors[key] for key in keys], arrivals)
        else:
            outputs = tf.nest.flatten(graph.infer(layer)(*arguments, **keywords))
        computed = zip(node.flat_output_ids, outputs, strict=True)
        tensors.update((key, output) for key, output in computed if output is not None)
    return [tensors.get(str(id(tensor))) for tensor in model.outputs]


def _check_pixels(samples, model):
    statistics = fusion.pre_activation_statistics(model)
    for name, (layer, values) in _compute_arrivals(samples, model).items():
        low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
        largest = max(-low, high)
        if largest <= LARGEST_INPUT or (low < 0 and largest < _LARGEST_CENTERED_INPUT):
            continue
        if not _has_trained_on(layer, values, statistics.get(name)):
            raise ValueError(
                f"calibration images reach {largest:g}, as pixels do, and layer {name!r} takes them like that; they "
                "must be normalized as for training the model, before it or by its first layer. If it was trained on "
                "such images, start it with keras.layers.Rescaling(1.0), which says so"
            )


def _has_trained_on(layer, inputs, statistics):
    """Whether a layer's outputs vary as much as its normalization had them vary in training."""
    if statistics is None or not isinstance(layer, WEIGHTED_LAYERS):
        return False
    outputs = [apply_kernel(layer, values, kernel_of(layer)).numpy() + bias_of(layer) for values in inputs]
    axes = tuple(range(outputs[0].ndim - 1))
    means = np.mean([values.mean(axes) for values in outputs], axis=0)
    squares = np.mean([np.square(values).mean(axes) for values in outputs], axis=0)
    deviations = np.sqrt(np.maximum(squares - np.square(means), 0))
    ratio = np.median(deviations / np.maximum(np.sqrt(statistics.variance), 1e-12))
    return 1 / _LARGEST_RATIO < ratio < _LARGEST_RATIO


def _check_normalized(samples, model, position, low, high):
    """Refuses images that the first layers divide by far more than images of that range need."""

    def fill(value):
        return [np.full_like(array, value) if index == position else array for index, array in enumerate(samples[0])]

    limit = (high - low) / _SMALLEST_DIVISOR
    # One dark and one bright image say by what the model divides: averages over pixels leave them as they are.
    ends = _compute_arrivals([fill(low), fill(high)], model)
    suspects = {name for name, (_, values) in ends.items() if _measure_spread(values) < limit}
    if not suspects:
        return
    # Normalizations that divide by what they measure on each image give no uniform images.
    for name, (_, values) in _compute_arrivals(samples, model).items():
        if name in suspects and (spread := _measure_spread(values)) < limit:
            raise ValueError(
                f"calibration images lie between {low:.3g} and {high:.3g}, as normalized images do, but the model "
                f"itself divides its input: layer {name!r} would see differences of {spread:.2g} at most; give images "
                "on the scale that the model takes, such as pixels from 0 to 255"
            )


def _measure_spread(batches):
    """The largest difference of two values in the same channel."""
    axes = tuple(range(batches[0].ndim - 1))
    lows, highs = np.min([batch.min(axes) for batch in batches], 0), np.max([batch.max(axes) for batch in batches], 0)
    return float(np.max(highs - lows))
