"""Codebooks as tensors: nearest centroids, Lloyd's algorithm, and the integer grid that centroids lie on.

Weights have the shape [rows, channels], centroids [channels, clusters], or [1, clusters] if all channels share them, in
ascending order. Clusters are then intervals whose borders are the midpoints between neighbouring centroids. Hence no
tensor here has as many elements as weights times clusters, and no loop in a training step runs over channels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from tf_repvgg.quantization.k_means import k_means
from tf_repvgg.quantization.shared_graphs import share_graph
from tf_repvgg.quantization.uniform import LARGEST_CODE

if TYPE_CHECKING:
    from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import CentroidInitialization

NUMBERS_OF_CLUSTERS = range(2, 257)  # a byte holds the index of a cluster
# Comparing with one border after another, fused into one pass, beats a binary search up to about this many clusters.
_FEW_CLUSTERS = 32
_WEIGHTS = (None, None)  # shape


def grid_scale(centroids: tf.Tensor) -> tf.Tensor:
    """The scale of each codebook's int8 grid, on which its largest centroid is code 127 or -127.

    Args:
      centroids: Centroids in any order, [1 or channels, clusters].

    Returns:
      Scales, [1 or channels].
    """
    largest = tf.reduce_max(tf.abs(centroids), axis=-1)
    # A codebook of zeros needs some scale; the largest one makes its bias as fine as those of the others.
    largest = tf.where(largest > 0, largest, tf.reduce_max(largest))
    return tf.where(largest > 0, largest, 1.0) / LARGEST_CODE


@tf.custom_gradient
def round_centroids(centroids: tf.Tensor) -> tf.Tensor:
    """Rounds centroids to int8 codes times `grid_scale`. The gradient passes straight through.

    Args:
      centroids: Centroids in any order, [1 or channels, clusters].
    """
    scale = grid_scale(centroids)[:, tf.newaxis]
    return tf.clip_by_value(tf.round(centroids / scale), -LARGEST_CODE, LARGEST_CODE) * scale, lambda upstream: upstream


def sort_and_round(is_frozen: tf.Tensor, centroids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sorts centroids and rounds them to their grid.

    One graph computes both results: with separate graphs TensorFlow may rearrange the division in one of them, and
    the last bit would differ.

    Args:
      is_frozen: Whether clusters are frozen, a bool scalar; the centroids then keep their order.
      centroids: Centroids in any order, [1 or channels, clusters].

    Returns:
      The centroids on their grid, and `grid_scale`.
    """
    return share_graph(_sort_and_round, (), _shape(centroids))(is_frozen, centroids)


def _sort_and_round(is_frozen, centroids):
    # The optimizer may have moved one centroid past another.
    ordered = tf.where(is_frozen, centroids, tf.sort(centroids, axis=-1))
    return round_centroids(ordered), grid_scale(ordered)


def assign(weights: tf.Tensor, centroids: tf.Tensor) -> tf.Tensor:
    """Finds the index of the nearest centroid of each weight; ties go to the smaller centroid.

    Args:
      weights: Weights, [rows, channels].
      centroids: Centroids, [1 or channels, clusters], ascending.

    Returns:
      Indices, int32 [rows, channels].

    Example:
      >>> import tensorflow as tf
      >>> from tf_repvgg.quantization import codebooks
      >>> weights = tf.constant([[-0.9], [0.2], [3.0]])
      >>> codebooks.assign(weights, tf.constant([[-1.0, 0.0, 2.0]])).numpy().ravel().tolist()
      [0, 1, 2]
    """
    clusters = centroids.shape[-1]
    if clusters <= _FEW_CLUSTERS:
        numbers = tf.broadcast_to(tf.range(clusters, dtype=tf.float32), tf.shape(centroids))
        return tf.cast(_select_nearest(weights, centroids, numbers), tf.int32)
    borders = _borders(centroids)
    if centroids.shape[0] == 1:
        indices = tf.searchsorted(borders[0], tf.reshape(weights, [-1]))
        return tf.reshape(indices, tf.shape(weights))
    return tf.transpose(tf.searchsorted(borders, tf.transpose(weights)))


def look_up(centroids: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Looks up centroids by their index.

    Args:
      centroids: Centroids, [1 or channels, clusters].
      indices: Indices as `assign` returns them, [rows, channels].

    Returns:
      Centroids, float32 [rows, channels].
    """
    if centroids.shape[0] == 1:
        return tf.gather(centroids[0], indices)
    return tf.transpose(tf.gather(centroids, tf.transpose(indices), batch_dims=1))


def find_nearest(weights: tf.Tensor, centroids: tf.Tensor) -> tf.Tensor:
    """Finds the centroid nearest to each weight, without a gradient.

    Args:
      weights: Weights, [rows, channels].
      centroids: Centroids, [1 or channels, clusters], ascending.

    Returns:
      Centroids, float32 [rows, channels].
    """
    if centroids.shape[-1] <= _FEW_CLUSTERS:
        return _select_nearest(weights, centroids, centroids)
    return look_up(centroids, assign(weights, centroids))


def quantize(
    weights: tf.Tensor,
    centroids: tf.Tensor,
    is_frozen: tf.Tensor,
    assignments: tf.Tensor,
    aggregation: str | None = None,
) -> tf.Tensor:
    """Replaces each weight by its nearest centroid, or, while clusters are frozen, by the one that it is assigned to.

    The gradient passes straight through to the weights, and is zero while clusters are frozen. The gradient of a
    centroid is the sum or the mean of the gradients of its weights.

    Args:
      weights: Weights, [rows, channels].
      centroids: Centroids, [1 or channels, clusters], ascending unless frozen.
      is_frozen: Whether clusters are frozen, a bool scalar.
      assignments: Index of the centroid of each weight while clusters are frozen, any integers [rows, channels].
      aggregation: Reduction of gradients to centroids: "sum", "mean", or None for no gradient.

    Returns:
      Centroids, float32 [rows, channels].
    """

    @tf.custom_gradient
    def replace(weights, centroids):
        select = share_graph(_look_up_or_find_nearest, (), _WEIGHTS, _shape(centroids), _WEIGHTS)
        quantized = select(is_frozen, weights, centroids, assignments)

        def gradient(upstream):
            to_weights = share_graph(_zero_if, (), _WEIGHTS)(is_frozen, upstream)
            if aggregation is None:
                return to_weights, None
            indices = tf.where(is_frozen, tf.cast(assignments, tf.int32), assign(weights, centroids))
            to_centroids = _sum_by_cluster(upstream, indices, centroids)
            if aggregation == "mean":
                count = _sum_by_cluster(tf.ones_like(weights), indices, centroids)
                to_centroids = tf.math.divide_no_nan(to_centroids, count)
            return to_weights, to_centroids

        return quantized, gradient

    return replace(weights, centroids)


def _look_up_or_find_nearest(is_frozen, weights, centroids, assignments):
    def look_up_assigned():
        return look_up(centroids, tf.cast(assignments, tf.int32))

    return tf.cond(is_frozen, look_up_assigned, lambda: find_nearest(weights, centroids))


def _zero_if(is_frozen, upstream):
    # A condition instead of a product costs no pass over the gradient while nothing is frozen.
    return tf.cond(is_frozen, lambda: tf.zeros_like(upstream), lambda: upstream)


def take_lloyd_step_if(is_due: tf.Tensor, weights: tf.Tensor, centroids: tf.Tensor, rate: float) -> tf.Tensor:
    """Applies `take_lloyd_step` if it is due.

    Args:
      is_due: Whether to take the step, a bool scalar.
      weights: Weights, [rows, channels].
      centroids: Centroids in any order, [1 or channels, clusters].
      rate: Share of the way to the means, from 0 to 1.

    Returns:
      The moved centroids, ascending; the centroids as they are if the step is not due.
    """
    step = share_graph(_take_lloyd_step_if, (), _WEIGHTS, _shape(centroids), ())
    return step(is_due, weights, centroids, tf.constant(rate, tf.float32))


def _take_lloyd_step_if(is_due, weights, centroids, rate):
    return tf.cond(is_due, lambda: take_lloyd_step(weights, tf.sort(centroids, axis=-1), rate), lambda: centroids)


def take_lloyd_step(weights: tf.Tensor, centroids: tf.Tensor, rate: float | tf.Tensor) -> tf.Tensor:
    """Moves every centroid part of the way to the mean of the weights nearest to it.

    A cluster without weights starts anew near the cluster with the largest inertia: one standard deviation from the
    mean, on the side of the weight farthest from it, so that it gets that weight. If several clusters are empty, the
    next one starts near the cluster with the next largest inertia, and so on.

    Args:
      weights: Weights, [rows, channels].
      centroids: Centroids, [1 or channels, clusters], ascending.
      rate: Share of the way to the means, from 0 to 1.

    Returns:
      The moved centroids, ascending.

    Example:
      >>> import tensorflow as tf
      >>> from tf_repvgg.quantization import codebooks
      >>> weights = tf.constant([[-3.0], [-1.0], [4.0], [6.0]])
      >>> codebooks.take_lloyd_step(weights, tf.constant([[-4.0, 3.0]]), rate=0.5).numpy().tolist()
      [[-3.0, 4.0]]
    """
    indices = assign(weights, centroids)
    count = _sum_by_cluster(tf.ones_like(weights), indices, centroids)
    mean = tf.math.divide_no_nan(_sum_by_cluster(weights, indices, centroids), count)
    moved = centroids + rate * (mean - centroids)
    is_empty = count == 0

    def restart_empty():
        number = tf.maximum(tf.cumsum(tf.cast(is_empty, tf.int32), axis=-1) - 1, 0)
        return tf.where(is_empty, tf.gather(_seeds(weights, indices, count, mean), number, batch_dims=1), moved)

    return tf.sort(tf.cond(tf.reduce_any(is_empty), restart_empty, lambda: moved), axis=-1)


def _seeds(weights, indices, count, mean):
    """Centroids at which clusters without weights start anew, in the order of use; see `take_lloyd_step`."""
    inertia = _sum_by_cluster(tf.square(weights - look_up(mean, indices)), indices, mean)
    smallest = -_reduce_by_cluster(-weights, indices, mean, tf.math.unsorted_segment_max, tf.reduce_max)
    largest = _reduce_by_cluster(weights, indices, mean, tf.math.unsorted_segment_max, tf.reduce_max)
    side = tf.where(largest - mean >= mean - smallest, 1.0, -1.0)
    seeds = mean + side * tf.sqrt(tf.math.divide_no_nan(inertia, count))
    return tf.gather(seeds, tf.argsort(inertia, axis=-1, direction="DESCENDING"), batch_dims=1)


def inertia_and_counts(weights: tf.Tensor, centroids: tf.Tensor, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The sum of squared distances between weights and their centroids, and the number of weights in each cluster.

    Args:
      weights: Weights, [rows, channels].
      centroids: Centroids, [1 or channels, clusters].
      indices: Index of the centroid of each weight, [rows, channels].

    Returns:
      A scalar, and counts of shape [1 or channels, clusters].
    """
    inertia = tf.reduce_sum(tf.square(weights - look_up(centroids, indices)))
    return inertia, _sum_by_cluster(tf.ones_like(weights), indices, centroids)


def initial_centroids(
    weights: tf.Tensor,
    number_of_clusters: int,
    per_channel: bool,
    initialization: "CentroidInitialization | None" = None,
) -> tf.Tensor:
    """The centroids with which training starts.

    Args:
      weights: Weights, [rows, channels].
      number_of_clusters: Number of centroids in a codebook.
      per_channel: Whether every channel has its own codebook; otherwise all share one.
      initialization: Method of tfmot; None for k-means.

    Returns:
      Centroids, float32 [1 or channels, clusters], ascending. Some are equal if a codebook has fewer distinct weights
      than centroids.
    """
    if initialization is not None:
        from tensorflow_model_optimization.python.core.clustering.keras import clustering_centroids  # slow to import

        make = clustering_centroids.CentroidsInitializerFactory.get_centroid_initializer(initialization)
        as_convolution = tf.reshape(weights, [-1, 1, 1, weights.shape[-1]])
        centroids = make(as_convolution, number_of_clusters, per_channel).get_cluster_centroids()
        return tf.sort(tf.reshape(tf.cast(centroids, tf.float32), [-1, number_of_clusters]), axis=-1)
    columns = np.asarray(weights).T if per_channel else np.asarray(weights).reshape(1, -1)
    codebooks = [k_means(column, np.ones_like(column), number_of_clusters) for column in columns]
    return tf.constant(
        [np.pad(codebook, [0, number_of_clusters - len(codebook)], "edge") for codebook in codebooks], tf.float32
    )


def _shape(centroids):
    """The shape for `share_graph`: layers may differ in their channels, but not in the number of clusters."""
    return (1 if centroids.shape[0] == 1 else None, centroids.shape[-1])


def _borders(centroids):
    return (centroids[:, 1:] + centroids[:, :-1]) / 2


def _select_nearest(weights, centroids, values):
    """Selects from values [1 or channels, clusters] those of the nearest centroids, in the shape of the weights."""
    # By cluster first, so that all that a row of weights is compared with is contiguous in memory.
    return _select_by_borders(weights, tf.transpose(_borders(centroids)), tf.transpose(values))


# XLA compiles it once for each shape; one function serves centroids and their numbers as values.
@tf.function(jit_compile=True)
def _select_by_borders(weights, borders, values):
    selected = tf.broadcast_to(values[0], tf.shape(weights))
    for cluster, border in enumerate(tf.unstack(borders), 1):
        selected = tf.where(weights > border, values[cluster], selected)
    return selected


def _sum_by_cluster(values, indices, centroids):
    return _reduce_by_cluster(values, indices, centroids, tf.math.unsorted_segment_sum, tf.reduce_sum)


def _reduce_by_cluster(values, indices, centroids, reduce: Callable, combine: Callable):
    """Reduces values [rows, channels] over each cluster, to the shape of the centroids.

    By channel first, even if the channels share a codebook: consecutive additions to the same few sums would each wait
    for the one before, which takes several times as long.
    """
    channels, clusters = tf.shape(values)[-1], centroids.shape[-1]
    segments = indices + clusters * tf.range(channels)
    reduced = reduce(tf.reshape(values, [-1]), tf.reshape(segments, [-1]), channels * clusters)
    reduced = tf.reshape(reduced, [channels, clusters])
    return combine(reduced, axis=0, keepdims=True) if centroids.shape[0] == 1 else reduced
