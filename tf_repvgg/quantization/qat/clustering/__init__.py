"""ClusterQAT: training a network whose weights are a few centroids that move with them, exported code for code.

It extends tfmot's clustering API. The method is that of arXiv:2402.07200, with the choices of this project: centroids
follow the weights by running steps of Lloyd's algorithm and lie on the int8 grid of the exported file, and activations
are quantized as in that file, so that evaluation in training computes what the file computes.
"""

from collections.abc import Mapping
from typing import Any

import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)
from tensorflow_model_optimization.python.core.clustering.keras.clusterable_layer import ClusterableLayer

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.checks import clusters_by_layer, per_channel_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.qat.clustering.block import BATCH_NORM_STATISTICS, ClusterQuantizeBlock
from tf_repvgg.quantization.qat.clustering.callbacks import ClusterLog, FreezeClusters
from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining
from tf_repvgg.quantization.qat.clustering.wrapper import ClusteringWrapper, ClusterQuantize
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
    cluster_per_channel: bool | str | Mapping[str, bool] = False,
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM,
    *,
    centroid_update_rate: float = 0.1,
    centroid_update_steps: int = 10,
    train_centroids: bool = False,
    ramp_steps: int = 0,
    batch_norm_statistics: str | None = None,
    activation_bits: int | None = 8,
    range_momentum: float = 0.99,
    calibration: Any = None,
) -> keras.Model:
    """Copies a model for training with clustered weights and quantized activations.

    Args:
      model: Functional deploy-form model (see `tf_repvgg.fusion.fuse`), or one with blocks in training form if
        `batch_norm_statistics` is given. Conv2D, Conv2DTranspose, DepthwiseConv2D, Dense and tfmot's
        `ClusterableLayer`s are clustered; biases are not.
      number_of_clusters: Number of clusters in a codebook, from 2 to 256, or numbers by pattern of layer names, first
        match wins; also as text: "stem=256,logits=256,.*=8".
      cluster_centroids_init: Initialization of the centroids, one of tfmot's; None for k-means.
      cluster_per_channel: Whether every output channel has its own codebook, otherwise the kernel has one; or that by
        pattern of layer names: "stem=per_channel,.*=per_tensor" as text or as {pattern: whether it has}.
      cluster_gradient_aggregation: Aggregation of tfmot's gradient to a centroid over its weights; has an effect with
        `train_centroids` only.
      centroid_update_rate: Share of the way to the mean of its weights that a centroid moves, from 0 to 1.
      centroid_update_steps: Training steps from one such move to the next.
      train_centroids: Whether the optimizer moves centroids too, by tfmot's gradient.
      ramp_steps: Training steps in which quantization sets in gradually; see `CodebookTraining`.
      batch_norm_statistics: Treatment of batch normalization for models in training form, "frozen" or "running". The
        branches of every block then train, and every step quantizes their merged kernel; see `ClusterQuantizeBlock`.
        None for deploy form.
      activation_bits: Bits of activations, 8 or 16, quantized with running ranges, input included; None leaves
        activations in float.
      range_momentum: Momentum of the running ranges, from 0 to 1.
      calibration: Images as for training the model that initialize the ranges, in any form that
        `tf_repvgg.quantization.samples.read_samples` takes. Without them the outputs of the model are NaN until its
        first training step.

    Returns:
      A model with the inputs and outputs of `model`, not compiled. The codebook of a layer is in a `ClusterQuantize`
      layer named "cluster_<layer>"; other layers keep their names.

    Raises:
      ValueError: If the model is not functional; if it is not fused, and `batch_norm_statistics` is None; if it has
        other batch normalizations; if a number is out of range, or a pattern matches no layer or comes too late; if a
        layer has weights that cannot be clustered or are not finite; and for bad calibration images.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import cluster_quantize
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> clustered = cluster_quantize(model, number_of_clusters=5)
      >>> clustered.get_layer("cluster_conv").cluster_centroids["kernel"].shape
      TensorShape([1, 5])
    """
    in_training_form = batch_norm_statistics is not None
    model, inputs = wrapping.prepare_model(model, calibration, (ClusterableLayer,), in_training_form)
    _check_algorithms(model)
    classes = (*WEIGHTED_LAYERS, ClusterableLayer, *([ReparameterizedBlock] if in_training_form else []))
    clusters = clusters_by_layer(model, number_of_clusters, classes)
    per_channel = per_channel_by_layer(model, cluster_per_channel, classes)

    def make_wrapper(layer, name):
        training = CodebookTraining(
            clusters[name],
            cluster_centroids_init,
            per_channel[name],
            cluster_gradient_aggregation,
            centroid_update_rate,
            centroid_update_steps,
            train_centroids,
            ramp_steps,
        )
        if batch_norm_statistics is not None and isinstance(layer, ReparameterizedBlock):
            return ClusterQuantizeBlock(layer, batch_norm_statistics, **training.as_arguments())
        return ClusterQuantize(layer, **training.as_arguments())

    return wrapping.wrap_layers(model, make_wrapper, activation_bits, range_momentum, inputs, classes)


def strip_cluster_quantize(clustered: keras.Model) -> keras.Model:
    """Copies a model of `cluster_quantize` without the wrappers that only training needs; the function stays.

    Args:
      clustered: Trained model.

    Returns:
      A model of `QuantizedLayer`s and, if activations are quantized, `ActivationQuantizer`s, ready for
      `tf_repvgg.tflite.convert`. A `ClusterableLayer` of the user's own becomes a layer of its class with clustered
      weights.

    Raises:
      ValueError: If nothing in the model is clustered, or weights or centroids are not finite.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import cluster_quantize, strip_cluster_quantize
      >>> model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8, name="dense")])
      >>> clustered = cluster_quantize(model, number_of_clusters=5, activation_bits=None)
      >>> codes = strip_cluster_quantize(clustered).get_layer("dense").get_quantized_kernel().codes
      >>> len(np.unique(codes))
      5
    """
    return wrapping.strip_wrappers(clustered, ClusteringWrapper)


def _check_algorithms(model):
    for layer in graph.find_layers(model, ClusterableLayer):
        if any(layer.get_clusterable_algorithm(name) for name, _ in layer.get_clusterable_weights()):
            raise ValueError(
                f"layer {layer.name!r} brings its own clustering algorithm, which moving centroids do not follow; "
                "return None from get_clusterable_algorithm"
            )
