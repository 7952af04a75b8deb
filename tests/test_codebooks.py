"""Codebooks as tensors: nearest centroids, Lloyd's algorithm, gradients, and graphs that layers share."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg.quantization import codebooks


def distances_to_all_centroids(weights, centroids):
    """Array [rows, channels, clusters]."""
    books = np.broadcast_to(centroids, [weights.shape[1], centroids.shape[1]])
    return np.abs(weights[..., np.newaxis].astype(np.float64) - books)


@given(st.integers(2, 256), st.booleans(), st.integers(0, 1000))
def test_nearest_centroids(clusters, per_channel, seed):
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal([37, 6]).astype("float32")
    centroids = np.sort(generator.standard_normal([6 if per_channel else 1, clusters]).astype("float32"))
    distances = distances_to_all_centroids(weights, centroids)
    indices = codebooks.assign(weights, tf.constant(centroids)).numpy()
    actual = np.take_along_axis(distances, indices[..., np.newaxis], -1)[..., 0]
    np.testing.assert_allclose(actual, np.min(distances, axis=-1), atol=1e-6)
    nearest = codebooks.find_nearest(tf.constant(weights), tf.constant(centroids))
    np.testing.assert_array_equal(nearest, codebooks.look_up(tf.constant(centroids), indices))


@pytest.mark.parametrize("per_channel", [False, True])
def test_lloyd_step_by_definition(per_channel):
    weights = np.random.default_rng(0).standard_normal([50, 3]).astype("float32")
    centroids = np.tile(np.float32([[-1, 0, 0.5, 2]]), [3 if per_channel else 1, 1])
    moved = codebooks.take_lloyd_step(weights, tf.constant(centroids), 0.25).numpy()
    for row, book in enumerate(centroids):
        values = weights[:, row] if per_channel else weights.ravel()
        nearest = np.argmin(np.abs(values[:, np.newaxis] - book), axis=1)
        means = np.array([values[nearest == cluster].mean() for cluster in range(4)])
        np.testing.assert_allclose(moved[row], book + 0.25 * (means - book), rtol=1e-5)


def test_empty_clusters_start_anew():
    weights = np.float32([[-1.0, -1.2, 3.0, 5.0, 7.0, 9.0]]).T
    centroids = tf.constant([[-1.0, 6.0, 50.0, 60.0]])
    for _ in range(20):
        centroids = codebooks.take_lloyd_step(weights, centroids, 1.0)
    indices = codebooks.assign(weights, centroids)
    assert len(np.unique(indices)) == 4
    inertia, counts = codebooks.inertia_and_counts(weights, centroids, indices)
    assert inertia < 10 and np.all(counts > 0)


def test_a_cluster_starts_anew_at_the_farthest_weight():
    """On either side of the mean."""
    for outlier in (-10, 10):
        weights = tf.constant(np.append(np.linspace(0.09, 0.11, 99), outlier).reshape(-1, 1), tf.float32)
        centroids = tf.constant([[0.1, 50.0]])
        for _ in range(3):
            centroids = codebooks.take_lloyd_step(weights, tf.sort(centroids, axis=-1), 1.0)
        _, counts = codebooks.inertia_and_counts(weights, centroids, codebooks.assign(weights, centroids))
        assert sorted(counts.numpy()[0]) == [1, 99]


@pytest.mark.parametrize("clusters, per_channel", [(4, False), (4, True), (40, False), (40, True)])
def test_layers_of_all_shapes_share_a_graph(clusters, per_channel):
    """With variables too, which have a shape of their own. The graph computes the same as the functions in it."""
    generator = np.random.default_rng(0)
    for rows, channels in ((50, 3), (90, 7), (60, 1), (50, 8)):
        weights = tf.Variable(generator.standard_normal([rows, channels]).astype("float32"))
        book = generator.standard_normal([channels if per_channel else 1, clusters]).astype("float32")
        centroids, ascending = tf.Variable(book), tf.constant(np.sort(book))
        indices = generator.integers(0, clusters, [rows, channels]).astype("uint8")
        assignments = tf.Variable(indices, trainable=False)
        for condition in (False, True):
            quantized = codebooks.quantize(weights, ascending, tf.constant(condition), assignments)
            assigned = codebooks.look_up(ascending, tf.cast(assignments, tf.int32))
            expected = assigned if condition else codebooks.find_nearest(weights, ascending)
            np.testing.assert_array_equal(quantized, expected)
            moved = codebooks.take_lloyd_step_if(tf.constant(condition), weights, centroids, 0.5)
            stepped = codebooks.take_lloyd_step(tf.convert_to_tensor(weights), ascending, 0.5)
            np.testing.assert_allclose(moved, stepped if condition else centroids, rtol=1e-6)


def test_gradients():
    weights = tf.constant([[-1.0], [-0.9], [2.0], [5.0]])
    centroids = tf.constant([[-1.0, 1.0, 4.0]])
    upstream = tf.constant([[1.0], [3.0], [10.0], [20.0]])
    assignments = tf.constant([[0], [0], [1], [2]], tf.uint8)
    quantize = functools.partial(codebooks.quantize, is_frozen=tf.constant(False), assignments=assignments)
    for aggregation, expected in ((None, None), ("sum", [[4.0, 10.0, 20.0]]), ("mean", [[2.0, 10.0, 20.0]])):
        with tf.GradientTape() as tape:
            tape.watch([weights, centroids])
            quantized = quantize(weights, codebooks.round_centroids(centroids), aggregation=aggregation)
            total = tf.reduce_sum(quantized * upstream)
        to_weights, to_centroids = tape.gradient(total, [weights, centroids])
        np.testing.assert_array_equal(to_weights, upstream)
        assert (expected is None and to_centroids is None) or np.array_equal(to_centroids, expected)
