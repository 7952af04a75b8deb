"""K-means in one dimension."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg.quantization.k_means import k_means


@given(seed=st.integers(0, 1000), clusters=st.integers(2, 40))
def test_k_means(seed, clusters):
    """A fixed point of Lloyd's algorithm that is better than a uniform grid of as many levels."""
    generator = np.random.default_rng(seed)
    values, weights = generator.standard_t(3, 500), generator.uniform(0.1, 5, 500)
    centroids = k_means(values, weights, clusters)
    assert len(centroids) == clusters and np.all(np.diff(centroids) >= 0)

    def error(book):
        return np.sum(weights * np.min(np.square(values[:, None] - book), axis=1))

    assert error(centroids) < error(np.linspace(values.min(), values.max(), clusters))


def test_k_means_follows_the_weights():
    values = np.array([0.0, 1.0, 10.0, 11.0])
    np.testing.assert_allclose(k_means(values, np.array([1, 3, 1, 1]), 2), [0.75, 10.5])
    np.testing.assert_array_equal(k_means(np.array([2.0, 1.0, 2.0]), np.ones(3), 5), [1, 2])
    np.testing.assert_array_equal(k_means(np.zeros(4), np.zeros(4), 3), [0])
