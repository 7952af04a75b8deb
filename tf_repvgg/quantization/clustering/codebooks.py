"""Codebooks as tensors: nearest centroids, Lloyd's algorithm, and the integer grid that centroids lie on.

Weights are [rows, channels]; centroids [channels, states], or [1, states] where all channels share them, in ascending
order. Clusters are then intervals whose borders are the midpoints between neighbours, so that nothing here is as large
as weights times states, and no loop runs over channels.
"""

import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.clustering.keras import clustering_centroids

from tf_repvgg.quantization.k_means import k_means

LARGEST_CODE = 127
# Comparing with one border after the other, fused into one pass, beats a binary search up to about so many states.
_FEW_STATES = 32


def grid_scale(centroids):
    """The step of each codebook's int8 grid, [1 or channels]: its largest centroid is code 127 or -127."""
    largest = tf.reduce_max(tf.abs(centroids), axis=-1)
    # A codebook of zeros needs some scale; the others' makes its bias as fine as its neighbours'.
    largest = tf.where(largest > 0, largest, tf.reduce_max(largest))
    return tf.where(largest > 0, largest, 1.0) / LARGEST_CODE


@tf.custom_gradient
def on_grid(centroids):
    """Centroids rounded to int8 codes times `grid_scale`; the gradient passes as if they were not."""
    scale = grid_scale(centroids)[:, tf.newaxis]
    return tf.clip_by_value(tf.round(centroids / scale), -LARGEST_CODE, LARGEST_CODE) * scale, lambda upstream: upstream


def assign(weights, centroids):
    """Index of the nearest centroid of each weight: int32 like the weights; ties go to the smaller centroid."""
    borders = _borders(centroids)
    if centroids.shape[-1] <= _FEW_STATES:
        return _assign_few(weights, tf.transpose(borders))
    if centroids.shape[0] == 1:
        found = tf.searchsorted(borders[0], tf.reshape(weights, [-1]))
        return tf.reshape(found, tf.shape(weights))
    return tf.transpose(tf.searchsorted(borders, tf.transpose(weights)))


def look_up(centroids, indices):
    """The centroids that `assign` found: float32, of the shape of `indices`."""
    if centroids.shape[0] == 1:
        return tf.gather(centroids[0], indices)
    return tf.transpose(tf.gather(centroids, tf.transpose(indices), batch_dims=1))


def quantize(weights, centroids, is_frozen, assignments, aggregation=None):
    """The centroid nearest to each weight, or while frozen the one that it is assigned to; shaped like the weights.

    Gradient: to the weights, straight through, and zero while frozen; to the centroids None, or by `aggregation` the
    "sum" or "mean" over the weights of each.

    Args:
      weights, centroids: see above.
      is_frozen: bool tensor.
      assignments: indices [rows, channels] that hold while frozen, of any integer type.
      aggregation: None, "sum" or "mean".
    """

    @tf.custom_gradient
    def function(weights, centroids):
        found = tf.cond(
            is_frozen, lambda: look_up(centroids, tf.cast(assignments, tf.int32)), lambda: nearest(weights, centroids)
        )

        def gradient(upstream):
            to_weights = tf.cond(is_frozen, lambda: tf.zeros_like(upstream), lambda: upstream)
            if aggregation is None:
                return to_weights, None
            indices = tf.where(is_frozen, tf.cast(assignments, tf.int32), assign(weights, centroids))
            total = _sums(upstream, indices, centroids)
            if aggregation == "mean":
                total = tf.math.divide_no_nan(total, _sums(tf.ones_like(weights), indices, centroids))
            return to_weights, total

        return found, gradient

    return function(weights, centroids)


def nearest(weights, centroids):
    """The centroid nearest to each weight, of the shape of the weights; no gradient."""
    if centroids.shape[-1] <= _FEW_STATES:
        return _nearest_few(weights, tf.transpose(centroids))
    return look_up(centroids, assign(weights, centroids))


def lloyd_step(weights, centroids, rate):
    """Moves every centroid by `rate` of the way to the mean of its weights; sorted.

    A cluster without weights starts anew one standard deviation from the mean of the cluster with the largest
    inertia, on the side of its weight that is farthest off, which it will hold then; where several are empty, of the
    cluster with the next largest.
    """
    indices = assign(weights, centroids)
    count = _sums(tf.ones_like(weights), indices, centroids)
    mean = tf.math.divide_no_nan(_sums(weights, indices, centroids), count)
    moved = centroids + rate * (mean - centroids)
    is_empty = count == 0

    def revived():
        number = tf.maximum(tf.cumsum(tf.cast(is_empty, tf.int32), axis=-1) - 1, 0)
        return tf.where(is_empty, tf.gather(_seeds(weights, indices, count, mean), number, batch_dims=1), moved)

    return tf.sort(tf.cond(tf.reduce_any(is_empty), revived, lambda: moved), axis=-1)


def _seeds(weights, indices, count, mean):
    """Where clusters without weights start anew, the first of them first; see `lloyd_step`."""
    inertia = _sums(tf.square(weights - look_up(mean, indices)), indices, mean)
    smallest = -_of_clusters(-weights, indices, mean, tf.math.unsorted_segment_max, tf.reduce_max)
    largest = _of_clusters(weights, indices, mean, tf.math.unsorted_segment_max, tf.reduce_max)
    side = tf.where(largest - mean >= mean - smallest, 1.0, -1.0)
    seeds = mean + side * tf.sqrt(tf.math.divide_no_nan(inertia, count))
    return tf.gather(seeds, tf.argsort(inertia, axis=-1, direction="DESCENDING"), batch_dims=1)


def inertia_and_counts(weights, centroids):
    """Squared distance of the weights to their centroids, a sum, and weights per cluster [1 or channels, states]."""
    indices = assign(weights, centroids)
    distance = tf.reduce_sum(tf.square(weights - look_up(centroids, indices)))
    return distance, _sums(tf.ones_like(weights), indices, centroids)


def initial_centroids(weights, states, per_channel, initialization=None):
    """Centroids to start with: those of k-means, or of one of tfmot's `CentroidInitialization`; sorted."""
    if initialization is not None:
        make = clustering_centroids.CentroidsInitializerFactory.get_centroid_initializer(initialization)
        as_convolution = tf.reshape(weights, [-1, 1, 1, weights.shape[-1]])
        found = make(as_convolution, states, per_channel).get_cluster_centroids()
        return tf.sort(tf.reshape(tf.cast(found, tf.float32), [-1, states]), axis=-1)
    columns = np.asarray(weights).T if per_channel else np.asarray(weights).reshape(1, -1)
    found = [k_means(column, np.ones_like(column), states) for column in columns]
    # Of a kernel with fewer values than states, several centroids are the same.
    return tf.constant([np.pad(centroids, [0, states - len(centroids)], "edge") for centroids in found], tf.float32)


def _borders(centroids):
    return (centroids[:, 1:] + centroids[:, :-1]) / 2


# By state first, [states, channels or 1], so that what a row of weights is compared with lies side by side in memory.
@tf.function(jit_compile=True)
def _nearest_few(weights, centroids):
    found = tf.broadcast_to(centroids[0], tf.shape(weights))
    borders = (centroids[1:] + centroids[:-1]) / 2
    for state in range(1, centroids.shape[0]):
        found = tf.where(weights > borders[state - 1], centroids[state], found)
    return found


@tf.function(jit_compile=True)
def _assign_few(weights, borders):
    found = tf.zeros_like(weights, tf.int32)
    for border in range(borders.shape[0]):
        found += tf.cast(weights > borders[border], tf.int32)
    return found


def _sums(values, indices, centroids):
    return _of_clusters(values, indices, centroids, tf.math.unsorted_segment_sum, tf.reduce_sum)


def _of_clusters(values, indices, centroids, reduce, combine):
    """A reduction of values [rows, channels] over each cluster, in the shape of the centroids.

    By channel first, even where the channels share a codebook: additions in a row to the same few sums would each wait
    for the one before, which takes several times as long.
    """
    channels, states = values.shape[-1], centroids.shape[-1]
    segments = indices + states * tf.range(channels)
    found = reduce(tf.reshape(values, [-1]), tf.reshape(segments, [-1]), channels * states)
    found = tf.reshape(found, [channels, states])
    return found if centroids.shape[0] == channels else combine(found, axis=0, keepdims=True)
