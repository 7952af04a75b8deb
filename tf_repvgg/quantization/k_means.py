"""K-means in one dimension: where codebooks start."""

import numpy as np

_SWEEPS = 100


def k_means(values, weights, states) -> np.ndarray:
    """Centroids, sorted, of weighted k-means in one dimension; fewer where there are fewer distinct values.

    Args:
      values, weights: float arrays [count].
      states: largest number of centroids.

    Lloyd's algorithm on sorted values, where clusters are intervals and their means differences of cumulative sums.
    """
    order = np.argsort(values)
    values, weights = np.asarray(values, np.float64)[order], np.asarray(weights, np.float64)[order]
    weights = weights + 1e-12 * max(weights.max(), 1e-30)  # inputs that are always zero
    if len(distinct := np.unique(values)) <= states:
        return distinct
    mass, moment = (np.concatenate([[0], np.cumsum(part)]) for part in (weights, weights * values))
    # Density to the power 1/3 is where centroids of the smallest error lie (Panter and Dite); ranges see the tails too.
    centroids = np.quantile(np.concatenate([values, np.linspace(values[0], values[-1], len(values))]), _middles(states))
    for _ in range(_SWEEPS):
        borders = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], borders, [len(values)]])
        is_empty = edges[1:] == edges[:-1]
        of_cluster = np.where(is_empty, 1, mass[edges[1:]] - mass[edges[:-1]])
        moved = np.where(is_empty, centroids, (moment[edges[1:]] - moment[edges[:-1]]) / of_cluster)
        if np.any(is_empty):
            # Empty clusters start anew where errors are largest.
            errors = weights * np.square(values - np.repeat(moved, np.diff(edges)))
            moved[is_empty] = values[np.argsort(errors)[-np.count_nonzero(is_empty) :]]
        elif np.all(np.abs(moved - centroids) <= 1e-7 * np.abs(centroids)):
            break
        centroids = np.sort(moved)
    return centroids


def _middles(count):
    return (np.arange(count) + 0.5) / count
