"""Weights as a long training might leave them, for tests of exactness."""

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock


def randomize(model_or_block, seed=0, gain=0.6, dead_share=0.1):
    """Draws all batch-norm weights: variances 1e-3 to 10, gammas of `gain` standard deviations, some dead channels.

    A dead channel of a block has zero kernels, gammas, running means and variances; only its betas remain.
    """
    generator = np.random.default_rng(seed)
    blocks = graph.find_layers(model_or_block, ReparameterizedBlock)
    for block in blocks:
        dead = generator.random(block.filters) < dead_share
        for layer in graph.find_layers(block):
            if isinstance(layer, keras.layers.BatchNormalization):
                variance = 10.0 ** generator.uniform(-3, 1, block.filters)
                sign = generator.choice([-1.0, 1.0], block.filters)
                layer.moving_variance.assign(np.where(dead, 0, variance))
                layer.moving_mean.assign(np.where(dead, 0, generator.normal(0, 0.5, block.filters)))
                layer.gamma.assign(
                    np.where(dead, 0, sign * gain * generator.uniform(0.5, 1.5, block.filters) * np.sqrt(variance))
                )
                layer.beta.assign(generator.normal(0, 0.5, block.filters))
            elif isinstance(layer, keras.layers.Conv2D) and layer.use_bias:  # of a squeeze-and-excite
                layer.bias.assign(generator.normal(0, 1, layer.filters))
            elif isinstance(layer, keras.layers.Conv2D):
                layer.kernel.assign(np.where(dead, 0, layer.kernel.numpy()))


def relative_error(expected, actual):
    """Largest difference over the largest expected magnitude."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert expected.shape == actual.shape
    assert np.all(np.isfinite(expected))
    return np.max(np.abs(expected - actual)) / np.max(np.abs(expected))
