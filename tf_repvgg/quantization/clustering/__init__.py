"""ClusterQAT: training a network whose weights are a few centroids that move with them, exported code for code.

It extends tfmot's clustering API. Source: arXiv:2402.07200, with the choices of this project: centroids follow the
weights by running steps of Lloyd's algorithm, lie on the int8 grid of the exported file, and activations are quantized
as in that file, so that what is evaluated in training is what the file computes.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)
from tensorflow_model_optimization.python.core.clustering.keras.clusterable_layer import ClusterableLayer

from tf_repvgg import graph
from tf_repvgg.quantization.activations import (
    WEIGHTED,
    ActivationQuantizer,
    quantize_activations,
    quantizer_before,
    quantizers,
)
from tf_repvgg.quantization.checks import by_layer, check_fused, checked_images
from tf_repvgg.quantization.clustering.callbacks import ClusterLog, FreezeClusters
from tf_repvgg.quantization.clustering.wrapper import ClusterQuantize
from tf_repvgg.quantization.layers import QuantizedLayer, bias_of, has_quantized_form
from tf_repvgg.quantization.uniform import QuantizedKernel, at_least, min_scale_of_bias

__all__ = [
    "CentroidInitialization",
    "ClusterLog",
    "ClusterQuantize",
    "FreezeClusters",
    "GradientAggregation",
    "cluster_quantize",
    "strip_cluster_quantize",
]

_CLUSTERABLE = (*WEIGHTED, ClusterableLayer)
_BATCH = 64


def cluster_quantize(
    model: keras.Model,
    number_of_clusters: int | str | Mapping[str, int],
    cluster_centroids_init: CentroidInitialization | None = None,
    cluster_per_channel: bool = False,
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM,
    *,
    centroid_update_rate: float = 0.1,
    centroid_update_steps: int = 10,
    train_centroids: bool = False,
    activations: bool = True,
    range_momentum: float = 0.99,
    calibration: Iterable | None = None,
) -> keras.Model:
    """A copy of a fused model to be trained with clustered weights and 8-bit activations.

    Args:
      model: functional deploy-form model (see `tf_repvgg.fusion.fuse`). Conv2D, DepthwiseConv2D, Dense and tfmot's
        `ClusterableLayer`s are clustered, biases stay as they are.
      number_of_clusters: states of each codebook, 2 to 256; or {pattern of layer names: states}, the first match
        wins; also as text, "stem=256,logits=256,.*=8".
      cluster_centroids_init: None for k-means, or one of tfmot's.
      cluster_per_channel: a codebook for every output channel, or one for the kernel.
      cluster_gradient_aggregation: of tfmot's gradient, which moves centroids with `train_centroids`.
      centroid_update_rate, centroid_update_steps, train_centroids: see `ClusterQuantize`.
      activations: whether activations are quantized to 8 bits, from running ranges, input included.
      range_momentum: of those ranges.
      calibration: normalised float images [height, width, channels] that set the ranges to start with; without them
        the model's output is NaN until its first training step.

    Returns:
      A model with the inputs and outputs of `model`, not compiled, whose layers are called as before; codebooks are in
      `ClusterQuantize` layers named "cluster_<layer>".

    Raises:
      ValueError: for a model that is not functional or not fused, numbers out of range, patterns that match no layer, a
        layer whose weights cannot be clustered or are not finite, and bad calibration images.
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"cluster_quantize needs a functional or built Sequential Keras 2 model, but got {type(model).__name__}"
        )
    check_fused(model)
    _check_clusterable(model)
    states = by_layer(model, number_of_clusters, "numbers of clusters", 2, 256, _CLUSTERABLE)

    def clustered(layer, changes):
        copy = type(layer).from_config(layer.get_config() | changes)
        weights = layer.get_weights()
        wrapper = ClusterQuantize(
            copy,
            states[unique_names[id(layer)]],
            cluster_centroids_init,
            cluster_per_channel,
            cluster_gradient_aggregation,
            centroid_update_rate,
            centroid_update_steps,
            train_centroids,
        )

        def call(inputs, **keywords):
            if not copy.built:
                # Centroids start from the weights, so these must be there first.
                copy.build(inputs.shape)
                copy.set_weights(weights)
            return wrapper(inputs, **keywords)

        return call

    unique_names = graph.unique_names(model)
    found = quantize_activations(
        model,
        clustered,
        lambda **options: ActivationQuantizer(range_momentum, **options) if activations else lambda tensor: tensor,
        _CLUSTERABLE,
    )
    if calibration is not None:
        _calibrate(found, checked_images(calibration, model.input_shape))
    return found


def strip_cluster_quantize(clustered: keras.Model) -> keras.Model:
    """The model without what only training needs: the same function, ready for `tf_repvgg.tflite.convert`.

    Returns:
      A model of `QuantizedLayer`s and, where activations are quantized, `ActivationQuantizer`s; a `ClusterableLayer` of
      the user's own becomes one of its class that holds its clustered weights.

    Raises:
      ValueError: if nothing in the model is clustered.
    """
    if not any(isinstance(layer, ClusterQuantize) for layer in clustered._flatten_layers()):
        raise ValueError(f"model {clustered.name!r} holds no clustered layers; it must come from cluster_quantize")
    stripped = graph.rebuild(
        clustered, lambda layer: layer.stripped() if isinstance(layer, ClusterQuantize) else graph.copied(layer)
    )
    if quantizers(stripped):
        for layer in stripped._flatten_layers():
            if isinstance(layer, QuantizedLayer):
                _make_room_for_bias(layer)
    return stripped


def _make_room_for_bias(layer):
    """Raises scales at which the bias would overflow: those of channels that are zero but for the bias, or nearly."""
    quantized = layer.quantized_kernel()
    smallest = min(quantizer_before(node.keras_inputs[0]).scale() for node in layer.inbound_nodes)
    scale = at_least(quantized.scale, min_scale_of_bias(bias_of(layer), smallest))
    if np.any(scale != quantized.scale):
        codes = np.where(scale == quantized.scale, quantized.codes, np.round(quantized.dequantize() / scale))
        layer.set_quantized_kernel(QuantizedKernel(codes.astype(np.int8), scale))


def _check_clusterable(model):
    for layer in model._flatten_layers(include_self=False):
        has_own_way = isinstance(layer, ClusterableLayer)
        if has_own_way and any(layer.get_clusterable_algorithm(name) for name, _ in layer.get_clusterable_weights()):
            raise ValueError(
                f"layer {layer.name!r} brings its own clustering algorithm, which moving centroids do not follow; "
                "return None from get_clusterable_algorithm"
            )
        is_container = graph.is_functional(layer)
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        if layer.trainable_weights and not (has_own_way or is_container or is_norm or has_quantized_form(layer)):
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be clustered; Conv2D, "
                "DepthwiseConv2D, Dense and tfmot's ClusterableLayer can"
            )


def _calibrate(model, images):
    """Lets ranges run over the images while everything else rests."""
    wrappers = [layer for layer in model.layers if isinstance(layer, ClusterQuantize)]
    for wrapper in wrappers:
        wrapper.freeze()
    for start in range(0, len(images), _BATCH):
        model(np.concatenate(images[start : start + _BATCH]), training=True)
    for wrapper in wrappers:
        wrapper.freeze(False)
