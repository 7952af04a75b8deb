"""OABN under tf.distribute, in a process with two logical devices."""

_DISTRIBUTED = """
import numpy as np, tensorflow as tf
import tf_repvgg, tf_keras as keras
from tf_repvgg.layers import OutlierAwareBatchNormalization
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
generator = np.random.default_rng(0)
images = generator.standard_normal((16, 4, 4, 3)).astype("float32") * [1, 5, 0.1] + [0, 3, 1]
# The halves that the two replicas see differ, so unsynchronized statistics would show.
images[8:] += 2
labels = generator.integers(0, 2, 16)

def train(scope, synchronized):
    keras.utils.set_random_seed(0)
    with scope:
        norm = OutlierAwareBatchNormalization(k=0.1, momentum=0.5, synchronized=synchronized)
        model = keras.Sequential([keras.Input((4, 4, 3)), norm, keras.layers.Flatten(), keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(3):
        model.train_on_batch(images, labels)
        ratio = np.abs(norm.effective_gamma()) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
        assert np.all(ratio <= 0.1 * (1 + 1e-6)), ratio
        stored = np.abs(norm.gamma.numpy()) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
        # Without synchronization each replica projects against its own running variance.
        assert np.all(stored <= 0.1 * (1 + 1e-6)) or not synchronized, stored
    return model.get_weights()

import contextlib
synchronized, single = train(strategy.scope(), True), train(contextlib.nullcontext(), False)
# Unsynchronized layers of one device count variances with n - 1 (Bessel), synchronized ones with n = 256.
for actual, expected in zip(synchronized, single, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-3)
unsynchronized = train(strategy.scope(), False)
assert not np.allclose(unsynchronized[3], single[3], rtol=0.1)
"""


def test_synchronized_over_two_replicas(run_program):
    """Two replicas with synchronized statistics train like one device on the whole batch, within the bound."""
    result = run_program("-c", _DISTRIBUTED)
    assert result.returncode == 0, result.stderr[-3000:]
