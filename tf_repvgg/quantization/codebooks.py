"""Codebooks as tensors: nearest centroids, Lloyd's algorithm, and the integer grid that centroids lie on.

Weights are [rows, channels]; centroids [channels, states], or [1, states] where all channels share them, in ascending
order. Clusters are then intervals whose borders are the midpoints between neighbours, so that nothing here is as large
as weights times states, and in a training step no loop runs over channels.
"""

import numpy as np
import tensorflow as tf

from tf_repvgg.quantization.k_means import k_means
from tf_repvgg.quantization.shared_graphs import shared_graph
from tf_repvgg.quantization.uniform import LARGEST_CODE

# Comparing with one border after the other, fused into one pass, beats a binary search up to about so many states.
_FEW_STATES = 32
_WEIGHTS = (None, None)  # shape


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


def ordered_on_grid(is_frozen, centroids):
    """`on_grid` of centroids in ascending order, while frozen, bool tensor, in the one they are in; and `grid_scale`.

    One graph has both: each on its own, TensorFlow may rearrange the division, and the last bit would differ.
    """
    return shared_graph(_ordered_on_grid, (), _shape(centroids))(is_frozen, centroids)


def _ordered_on_grid(is_frozen, centroids):
    # The optimizer may have moved one centroid past another.
    ordered = tf.where(is_frozen, centroids, tf.sort(centroids, axis=-1))
    return on_grid(ordered), grid_scale(ordered)


def assign(weights, centroids):
    """Index of the nearest centroid of each weight: int32 like the weights; ties go to the smaller centroid."""
    states = centroids.shape[-1]
    if states <= _FEW_STATES:
        numbers = tf.broadcast_to(tf.range(states, dtype=tf.float32), tf.shape(centroids))
        return tf.cast(_chosen(weights, centroids, numbers), tf.int32)
    borders = _borders(centroids)
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
        choose = shared_graph(_held_or_nearest, (), _WEIGHTS, _shape(centroids), _WEIGHTS)
        found = choose(is_frozen, weights, centroids, assignments)

        def gradient(upstream):
            to_weights = shared_graph(_zero_where, (), _WEIGHTS)(is_frozen, upstream)
            if aggregation is None:
                return to_weights, None
            indices = tf.where(is_frozen, tf.cast(assignments, tf.int32), assign(weights, centroids))
            total = _sums(upstream, indices, centroids)
            if aggregation == "mean":
                total = tf.math.divide_no_nan(total, _sums(tf.ones_like(weights), indices, centroids))
            return to_weights, total

        return found, gradient

    return function(weights, centroids)


def _held_or_nearest(is_frozen, weights, centroids, assignments):
    def held():
        return look_up(centroids, tf.cast(assignments, tf.int32))

    return tf.cond(is_frozen, held, lambda: nearest(weights, centroids))


def _zero_where(is_frozen, upstream):
    # A choice, and no product: not frozen, it costs no pass over them.
    return tf.cond(is_frozen, lambda: tf.zeros_like(upstream), lambda: upstream)


def nearest(weights, centroids):
    """The centroid nearest to each weight, of the shape of the weights; no gradient."""
    if centroids.shape[-1] <= _FEW_STATES:
        return _chosen(weights, centroids, centroids)
    return look_up(centroids, assign(weights, centroids))


def lloyd_step_if(is_due, weights, centroids, rate):
    """`lloyd_step` of centroids in any order where it is due, bool tensor; else the centroids as they are."""
    step = shared_graph(_lloyd_step_if, (), _WEIGHTS, _shape(centroids), ())
    return step(is_due, weights, centroids, tf.constant(rate, tf.float32))


def _lloyd_step_if(is_due, weights, centroids, rate):
    return tf.cond(is_due, lambda: lloyd_step(weights, tf.sort(centroids, axis=-1), rate), lambda: centroids)


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


def inertia_and_counts(weights, centroids, indices):
    """Squared distance of the weights to their centroids, a sum, and weights per cluster [1 or channels, states]."""
    distance = tf.reduce_sum(tf.square(weights - look_up(centroids, indices)))
    return distance, _sums(tf.ones_like(weights), indices, centroids)


def initial_centroids(weights, states, per_channel, initialization=None):
    """Centroids to start with: those of k-means, or of one of tfmot's `CentroidInitialization`; sorted."""
    if initialization is not None:
        from tensorflow_model_optimization.python.core.clustering.keras import clustering_centroids  # dear to import

        make = clustering_centroids.CentroidsInitializerFactory.get_centroid_initializer(initialization)
        as_convolution = tf.reshape(weights, [-1, 1, 1, weights.shape[-1]])
        found = make(as_convolution, states, per_channel).get_cluster_centroids()
        return tf.sort(tf.reshape(tf.cast(found, tf.float32), [-1, states]), axis=-1)
    columns = np.asarray(weights).T if per_channel else np.asarray(weights).reshape(1, -1)
    found = [k_means(column, np.ones_like(column), states) for column in columns]
    # Of a kernel with fewer values than states, several centroids are the same.
    return tf.constant([np.pad(centroids, [0, states - len(centroids)], "edge") for centroids in found], tf.float32)


def _shape(centroids):
    """For `shared_graph`: layers may differ in the number of channels, not in that of states."""
    return (1 if centroids.shape[0] == 1 else None, centroids.shape[-1])


def _borders(centroids):
    return (centroids[:, 1:] + centroids[:, :-1]) / 2


def _chosen(weights, centroids, values):
    """Of values [1 or channels, states] those of the nearest centroids, of the shape of the weights."""
    # By state first, so that what a row of weights is compared with lies side by side in memory.
    return _chosen_of_few(weights, tf.transpose(_borders(centroids)), tf.transpose(values))


# XLA compiles it once for each shape; one function, whether the values are the centroids or their numbers.
@tf.function(jit_compile=True)
def _chosen_of_few(weights, borders, values):
    found = tf.broadcast_to(values[0], tf.shape(weights))
    for state, border in enumerate(tf.unstack(borders), 1):
        found = tf.where(weights > border, values[state], found)
    return found


def _sums(values, indices, centroids):
    return _of_clusters(values, indices, centroids, tf.math.unsorted_segment_sum, tf.reduce_sum)


def _of_clusters(values, indices, centroids, reduce, combine):
    """A reduction of values [rows, channels] over each cluster, in the shape of the centroids.

    By channel first, even where the channels share a codebook: additions in a row to the same few sums would each wait
    for the one before, which takes several times as long.
    """
    channels, states = tf.shape(values)[-1], centroids.shape[-1]
    segments = indices + states * tf.range(channels)
    found = reduce(tf.reshape(values, [-1]), tf.reshape(segments, [-1]), channels * states)
    found = tf.reshape(found, [channels, states])
    return combine(found, axis=0, keepdims=True) if centroids.shape[0] == 1 else found
