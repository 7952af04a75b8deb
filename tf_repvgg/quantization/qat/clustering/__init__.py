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

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.checks import values_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.qat.clustering.block import BATCH_NORM_STATISTICS, ClusterQuantizeBlock
from tf_repvgg.quantization.qat.clustering.callbacks import ClusterLog, FreezeClusters
from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining
from tf_repvgg.quantization.qat.clustering.wrapper import Clustered, ClusterQuantize
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS

__all__ = [
    "BATCH_NORM_STATISTICS",
    "CentroidInitialization",
    "ClusterLog",
    "ClusterQuantize",
    "ClusterQuantizeBlock",
    "FreezeClusters",
    "GradientAggregation",
    "cluster_quantize",
    "strip_cluster_quantize",
]


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
    ramp_steps: int = 0,
    batch_norm_statistics: str | None = None,
    activation_bits: int | None = 8,
    range_momentum: float = 0.99,
    calibration: Iterable | None = None,
) -> keras.Model:
    """A copy of a model to be trained with clustered weights and 8-bit activations.

    Args:
      model: functional deploy-form model (see `tf_repvgg.fusion.fuse`), or one whose blocks are in training form, with
        batch_norm_statistics. Conv2D, DepthwiseConv2D, Dense and tfmot's `ClusterableLayer`s are clustered, biases stay
        as they are.
      number_of_clusters: states of each codebook, 2 to 256; or {pattern of layer names: states}, the first match
        wins; also as text, "stem=256,logits=256,.*=8".
      cluster_centroids_init: None for k-means, or one of tfmot's.
      cluster_per_channel: a codebook for every output channel, or one for the kernel.
      cluster_gradient_aggregation: of tfmot's gradient, which moves centroids with `train_centroids`.
      centroid_update_rate, centroid_update_steps, train_centroids, ramp_steps: see `CodebookTraining`.
      batch_norm_statistics: None for deploy form. "frozen" or "running": the branches of every block train, and it is
        their merged kernel that is quantized, in every step; see `ClusterQuantizeBlock`.
      activation_bits: 8 or 16, of activations quantized from running ranges, input included; None leaves them float.
      range_momentum: of those ranges.
      calibration: normalised float images [height, width, channels] that set the ranges to start with, for models of
        one input; without them the model's output is NaN until its first training step.

    Returns:
      A model with the inputs and outputs of `model`, not compiled, whose layers are called as before; codebooks are in
      `ClusterQuantize` layers named "cluster_<layer>".

    Raises:
      ValueError: for a model that is not functional, or not fused and without batch_norm_statistics, other batch
        normalizations, numbers out of range, patterns that match no layer or come too late, a layer whose weights
        cannot be clustered or are not finite, and bad calibration images.
    """
    in_training_form = batch_norm_statistics is not None
    wrapping.check_model(model, (ClusterableLayer,), in_training_form)
    _check_algorithms(model)
    classes = (*WEIGHTED_LAYERS, ClusterableLayer, *([ReparameterizedBlock] if in_training_form else []))
    states = values_by_layer(model, number_of_clusters, "numbers of clusters", 2, 256, classes)

    def make_wrapper(layer, name):
        training = CodebookTraining(
            states[name],
            cluster_centroids_init,
            cluster_per_channel,
            cluster_gradient_aggregation,
            centroid_update_rate,
            centroid_update_steps,
            train_centroids,
            ramp_steps,
        )
        if isinstance(layer, ReparameterizedBlock):
            return ClusterQuantizeBlock(layer, batch_norm_statistics, **training.as_arguments())
        return ClusterQuantize(layer, **training.as_arguments())

    return wrapping.wrap_layers(model, make_wrapper, activation_bits, range_momentum, calibration, classes)


def strip_cluster_quantize(clustered: keras.Model) -> keras.Model:
    """The model without what only training needs: the same function, ready for `tf_repvgg.tflite.convert`.

    Returns:
      A model of `QuantizedLayer`s and, where activations are quantized, `ActivationQuantizer`s; a `ClusterableLayer` of
      the user's own becomes one of its class that holds its clustered weights.

    Raises:
      ValueError: if nothing in the model is clustered, and for weights or centroids that are not finite.
    """
    return wrapping.strip_wrappers(clustered, Clustered)


def _check_algorithms(model):
    for layer in graph.find_layers(model, ClusterableLayer):
        if any(layer.get_clusterable_algorithm(name) for name, _ in layer.get_clusterable_weights()):
            raise ValueError(
                f"layer {layer.name!r} brings its own clustering algorithm, which moving centroids do not follow; "
                "return None from get_clusterable_algorithm"
            )
