"""Trains on two logical devices in a process of its own, and compares the replicas after every step."""

import contextlib
import sys

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion
from tf_repvgg.layers import OutlierAwareBatchNormalization
from tf_repvgg.models import Variant, build_repvgg
from tf_repvgg.quantization import cluster_quantize, learned_step_quantize
from tf_repvgg.training import averages, distillation, optimization

STEPS, CLASSES = 3, 3
TINY = Variant(4, widths=(4,), depths=(1,), stem_stride=1, strides=(1,))


def make_data():
    """Images of which the second half, that of the second replica, has a wider range; and labels."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((16, 6, 6, 1)).astype(np.float32)
    images[8:] *= 3
    return images, generator.integers(0, CLASSES, 16)


def build(norm="bn", synchronized=False):
    keras.utils.set_random_seed(0)
    return build_repvgg(TINY, (6, 6, 1), CLASSES, norm, oabn_k=0.1, synchronized=synchronized)


def make_network(method, scope):
    """The network to train, its layers in the scope."""
    images, _ = make_data()
    fused = fusion.fuse(build())
    with scope:
        match method:
            case "oabn" | "oabn, not synchronized":
                return build("oabn", synchronized=method == "oabn")
            case "clusterqat":
                return cluster_quantize(fused, 4, calibration=images[:4], centroid_update_steps=1)
            case "clusterqat, trained centroids":
                return cluster_quantize(fused, 4, calibration=images[:4], centroid_update_steps=2, train_centroids=True)
            case "lsq":
                return learned_step_quantize(fused, 4, calibration=images[:4])
            case "distillation":
                return distillation.Distiller(build(synchronized=True), build())


def find_differences(variables):
    """Names of the variables that differ between replicas."""
    return [
        variable.name
        for variable in variables
        if len(np.unique([copy.numpy() for copy in variable.values], axis=0)) > 1
    ]


def check_replicas(method, model, averaged):
    differences = find_differences([*model.variables, *model.optimizer.variables, *averaged])
    if method == "oabn, not synchronized":
        # Statistics of plain BN, and means, are those of each replica. OABN's variances, and so its limits, are not.
        assert any("norm3x3/moving_variance" in name for name in differences)
        differences = [name for name in differences if "moving_" not in name or "norm_identity/moving_var" in name]
    assert not differences, f"{method}: {differences} differ between replicas"


def train(method, strategy):
    """Trains for some steps; returns weights, averages and losses."""
    scope = strategy.scope if strategy else contextlib.nullcontext
    model = make_network(method, scope())
    with scope():
        optimizer = optimization.make_optimizer(0.02, steps=100, warmup_steps=1, weight_decay=1e-2)
        model.compile(optimizer, optimization.CrossEntropy(CLASSES), metrics=[optimization.make_top1()])
        model.optimizer.build(model.trainable_variables)
        # Networks with quantizers have variables that are no numbers; they train without averages.
        average = averages.MovingAverage(model, 0.5) if method.startswith("oabn") else None
    averaged = average.averages if average else []
    losses = []
    batches = tf.data.Dataset.from_tensors(make_data()).repeat()
    batches = iter(strategy.experimental_distribute_dataset(batches) if strategy else batches)
    take_step = model.make_train_function()  # train_on_batch makes a dataset for every call, which takes long
    for _ in range(STEPS):
        losses.append(float(take_step(batches)["loss"]))
        if average:
            with scope():
                average.on_train_batch_end(0)
        if strategy:
            check_replicas(method, model, averaged)
        for norm in (layer for block in model.layers for layer in vars(block).values()):
            if isinstance(norm, OutlierAwareBatchNormalization):
                limit = 0.1 * np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
                assert np.all(np.abs(norm.gamma.numpy()) <= limit * (1 + 1e-6)), method
    with scope():
        return [weight.numpy().astype(float) for weight in [*model.weights, *averaged]], losses


def check_uneven_batches(strategy):
    """The gradient of a batch of 5 images, 3 on one replica and 2 on the other, is that of one device."""
    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((5, CLASSES)).astype(np.float32), generator.integers(0, CLASSES, 5)
    loss = optimization.CrossEntropy(CLASSES)

    def compute_gradient(variable, logits, labels):
        with tf.GradientTape() as tape:
            values = loss.call(labels, variable * logits)
            mean = tf.reduce_mean(values)
        return tape.gradient(mean, variable), values

    def compute_part():
        is_second = tf.distribute.get_replica_context().replica_id_in_sync_group == 1
        is_own = (tf.range(5) >= 3) == is_second
        return compute_gradient(variable, tf.boolean_mask(logits, is_own), tf.boolean_mask(labels, is_own))

    with strategy.scope():
        variable = tf.Variable(tf.ones([CLASSES]))
    gradients, values = tf.function(lambda: strategy.run(compute_part))()
    expected, expected_values = compute_gradient(tf.Variable(tf.ones([CLASSES])), logits, labels)
    np.testing.assert_allclose(strategy.reduce("MEAN", gradients, axis=None), expected, rtol=1e-5)
    actual_values = np.concatenate([value.numpy() for value in strategy.experimental_local_results(values)])
    np.testing.assert_allclose(actual_values, expected_values, rtol=1e-6)


def main():
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    check_uneven_batches(strategy)
    for method in sys.argv[1:]:
        (weights, losses), (expected, expected_losses) = train(method, strategy), train(method, None)
        if method == "oabn, not synchronized":
            continue  # each half of the batch has statistics of its own
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=method)
        for actual, value in zip(weights, expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5, err_msg=method)
        print(method)


if __name__ == "__main__":
    main()
