"""Pre-activation statistics of fused convolutions, against real passes."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.fusion import KINDS, images
from helpers.random_weights import randomize

from tf_repvgg.fusion import PreActivationStatistics, fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock


def compute_pre_activation(block_type, **arguments):
    """A linear block and its statistics, with running statistics of one large batch."""
    inputs = keras.Input((12, 12, 6))
    block = block_type(6, activation=None, momentum=0.0, name="block", **arguments)
    model = keras.Model(inputs, block(inputs))
    randomize(model, dead_share=0, gain=1.0)
    x = (images(12, 12, 6, count=256) * np.linspace(0.5, 2, 6) + np.linspace(-1, 1, 6)).astype("float32")
    model(x, training=True)  # momentum 0: the running statistics are those of this batch
    outputs = fuse(model)(x).numpy()
    return fuse(model).pre_activation_statistics["block"], outputs


def test_statistics_of_qarepvgg_are_those_of_real_passes():
    statistics, outputs = compute_pre_activation(QARepVGGBlock)
    assert isinstance(statistics, PreActivationStatistics)
    assert statistics.mean.shape == statistics.variance.shape == (6,)
    np.testing.assert_allclose(statistics.mean, outputs.mean(axis=(0, 1, 2)), atol=2e-3 * outputs.std())
    np.testing.assert_allclose(statistics.variance, outputs.var(axis=(0, 1, 2)), rtol=5e-3)


@pytest.mark.parametrize("kind", ["bn, norm", "bn, none", "oabn, norm", "oabn all, norm"])
def test_means_of_repvgg_are_those_of_real_passes(kind):
    make, arguments = KINDS[kind]
    statistics, outputs = compute_pre_activation(make, **arguments)
    np.testing.assert_allclose(statistics.mean, outputs.mean(axis=(0, 1, 2)), atol=2e-3 * outputs.std())
    # The variance assumes uncorrelated branches: only its order of magnitude is right.
    ratio = statistics.variance / outputs.var(axis=(0, 1, 2))
    assert np.all((ratio > 0.2) & (ratio < 5))


def test_variance_of_a_single_branch_is_exact():
    """With the 1x1 branch silenced and no identity nothing is correlated, and the formula must be exact."""
    inputs = keras.Input((12, 12, 6))
    block = RepVGGBlock(6, identity="none", activation=None, momentum=0.0, name="block")
    model = keras.Model(inputs, block(inputs))
    randomize(model, dead_share=0)
    block.norm1x1.gamma.assign(np.zeros(6))
    x = images(12, 12, 6, count=256)
    model(x, training=True)
    fused = fuse(model)
    np.testing.assert_allclose(
        fused.pre_activation_statistics["block"].variance, fused(x).numpy().var(axis=(0, 1, 2)), rtol=5e-3
    )


def test_statistics_are_none_where_nothing_determines_them():
    inputs = keras.Input((8, 8, 4))
    features = RepVGGBlock(4, identity="constant", name="constant")(inputs)
    fused = fuse(keras.Model(inputs, RepVGGBlock(8, identity="constant", name="no_identity")(features)))
    assert fused.pre_activation_statistics["constant"] is None
    assert fused.pre_activation_statistics["no_identity"].mean.shape == (8,)
