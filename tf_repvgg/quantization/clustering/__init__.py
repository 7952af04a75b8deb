"""ClusterQAT: training a network whose weights are a few centroids that move with them, exported code for code.

It extends tfmot's clustering API. Source: arXiv:2402.07200, with the choices of this project: centroids follow the
weights by running steps of Lloyd's algorithm, lie on the int8 grid of the exported file, and activations are quantized
as in that file, so that what is evaluated in training is what the file computes.
"""

from collections.abc import Iterable, Mapping

import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)
from tensorflow_model_optimization.python.core.clustering.keras.clusterable_layer import ClusterableLayer

from tf_repvgg.quantization import trainable
from tf_repvgg.quantization.activations import WEIGHTED
from tf_repvgg.quantization.checks import by_layer
from tf_repvgg.quantization.clustering.callbacks import ClusterLog, FreezeClusters
from tf_repvgg.quantization.clustering.wrapper import ClusterQuantize

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
    trainable.check_model(model, also=(ClusterableLayer,))
    _check_algorithms(model)
    states = by_layer(model, number_of_clusters, "numbers of clusters", 2, 256, _CLUSTERABLE)

    def make_wrapper(layer, name):
        return ClusterQuantize(
            layer,
            states[name],
            cluster_centroids_init,
            cluster_per_channel,
            cluster_gradient_aggregation,
            centroid_update_rate,
            centroid_update_steps,
            train_centroids,
        )

    found = trainable.wrapped(model, make_wrapper, activations, range_momentum, _CLUSTERABLE)
    if calibration is not None:
        wrappers = trainable.check_wrapped(found, ClusterQuantize)
        for wrapper in wrappers:
            wrapper.freeze()
        trainable.set_ranges(found, calibration)
        for wrapper in wrappers:
            wrapper.freeze(False)
    return found


def strip_cluster_quantize(clustered: keras.Model) -> keras.Model:
    """The model without what only training needs: the same function, ready for `tf_repvgg.tflite.convert`.

    Returns:
      A model of `QuantizedLayer`s and, where activations are quantized, `ActivationQuantizer`s; a `ClusterableLayer` of
      the user's own becomes one of its class that holds its clustered weights.

    Raises:
      ValueError: if nothing in the model is clustered.
    """
    return trainable.stripped(clustered, ClusterQuantize)


def _check_algorithms(model):
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, ClusterableLayer) and any(
            layer.get_clusterable_algorithm(name) for name, _ in layer.get_clusterable_weights()
        ):
            raise ValueError(
                f"layer {layer.name!r} brings its own clustering algorithm, which moving centroids do not follow; "
                "return None from get_clusterable_algorithm"
            )
