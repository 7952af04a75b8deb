"""Training steps that XLA compiles, as on TPUs: they compute what they compute without it."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.replicas import CLASSES, TINY

from tf_repvgg import fusion
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import cluster_quantize
from tf_repvgg.training import optimization

NETWORKS = {
    "OABN": lambda images: build(norm="oabn", oabn_k=0.1),
    "QARepVGG": lambda images: build(block="qarepvgg"),
    "ClusterQAT": lambda images: cluster_quantize(fusion.fuse(build()), 4, calibration=images, centroid_update_steps=1),
}


def build(**options):
    return build_repvgg(TINY, (6, 6, 1), CLASSES, **options)


def train(name, jit_compile):
    """Weights and losses after two steps."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((8, 6, 6, 1)).astype(np.float32)
    model = NETWORKS[name](images)
    optimizer = optimization.make_optimizer(0.05, steps=10, warmup_steps=1, weight_decay=1e-3)
    model.compile(optimizer, optimization.CrossEntropy(CLASSES), jit_compile=jit_compile)
    batches = iter(tf.data.Dataset.from_tensors((images, generator.integers(0, CLASSES, 8))).repeat())
    take_step = model.make_train_function()
    losses = [float(take_step(batches)["loss"]) for _ in range(2)]
    return model.get_weights(), losses


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_step_computes_the_same(name):
    (weights, losses), (expected, expected_losses) = train(name, jit_compile=True), train(name, jit_compile=False)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    # An activation on the border between two codes may be rounded to the other one.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name.startswith(("OABN", "QARepVGG")) else {"rtol": 0.03, "atol": 1e-3}
    for actual, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(actual, value, **tolerance)
