"""K-means in one dimension, where codebooks start."""

import numpy as np

_SWEEPS = 100


def k_means(values: np.ndarray, weights: np.ndarray, number_of_clusters: int) -> np.ndarray:
    """Finds the centroids of weighted k-means in one dimension.

    Lloyd's algorithm on sorted values, where clusters are intervals and their means follow from cumulative sums.

    Args:
      values: Values to be clustered, [count].
      weights: Weight of each value in the squared error, [count].
      number_of_clusters: Largest number of centroids.

    Returns:
      Centroids in ascending order, float64; fewer than `number_of_clusters` if there are fewer distinct values.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization.k_means import k_means
      >>> k_means(np.array([1.0, 9.0, 2.0, 11.0]), np.ones(4), number_of_clusters=2).tolist()
      [1.5, 10.0]
    """
    order = np.argsort(values)
    values, weights = np.asarray(values, np.float64)[order], np.asarray(weights, np.float64)[order]
    weights = weights + 1e-12 * max(weights.max(), 1e-30)  # some weight even for inputs that are always zero
    if len(distinct := np.unique(values)) <= number_of_clusters:
        return distinct
    mass, moment = (np.concatenate([[0], np.cumsum(part)]) for part in (weights, weights * values))
    # The error is smallest if centroids have the density of the values to the power 1/3 (Panter and Dite). Quantiles of
    # the values and as many evenly spaced points come close to that, and cover the tails.
    spread = np.concatenate([values, np.linspace(values[0], values[-1], len(values))])
    centroids = np.quantile(spread, (np.arange(number_of_clusters) + 0.5) / number_of_clusters)
    for _ in range(_SWEEPS):
        borders = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], borders, [len(values)]])
        is_empty = edges[1:] == edges[:-1]
        cluster_mass = np.where(is_empty, 1, mass[edges[1:]] - mass[edges[:-1]])
        moved = np.where(is_empty, centroids, (moment[edges[1:]] - moment[edges[:-1]]) / cluster_mass)
        if np.any(is_empty):
            # Empty clusters start anew where errors are largest.
            errors = weights * np.square(values - np.repeat(moved, np.diff(edges)))
            moved[is_empty] = values[np.argsort(errors)[-np.count_nonzero(is_empty) :]]
        elif np.all(np.abs(moved - centroids) <= 1e-7 * np.abs(centroids)):
            break
        centroids = np.sort(moved)
    return centroids
