"""Optimizer, loss, logs and resuming."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.models import BLOCKS, Variant, build_network, build_repvgg
from tf_repvgg.training import checkpoints, divergence, logs, optimization


def test_schedule_warms_up_and_falls_to_zero():
    optimizer = optimization.make_optimizer(0.4, steps=100, warmup_steps=10)
    schedule = optimizer._learning_rate
    rates = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.4, 11), atol=1e-6)
    steps = np.arange(10, 101)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.pi * (steps - 10) / 90)), atol=1e-6)
    assert rates[100] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("optimizer", optimization.OPTIMIZERS)
def test_weight_decay_leaves_normalizations_and_biases_alone(optimizer):
    model = build_repvgg("digits", (8, 8, 1), 10, norm="oabn", oabn_k="inf")
    optimizer = optimization.make_optimizer(0.1, steps=10**6, warmup_steps=0, weight_decay=0.5, optimizer=optimizer)
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    for _ in range(3):
        optimizer.apply_gradients((0 * variable, variable) for variable in model.trainable_variables)
    kinds = {"kernel": set(), "gamma": set(), "beta": set(), "bias": set()}
    for variable in model.trainable_variables:
        kind = variable.name.split("/")[-1].split(":")[0]
        kinds[kind] |= set(np.unique(variable.numpy()))
    assert kinds["gamma"] == kinds["beta"] == kinds["bias"] == {1.0}
    (shrunk,) = kinds["kernel"]
    # The first step of the warm-up has rate 0; each of the others shrinks by weight_decay * learning rate.
    assert shrunk == pytest.approx(0.95**2, rel=1e-4)


def test_cross_entropy_with_label_smoothing():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 3, 3, 0])
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for smoothing in (0.0, 0.2):
        loss = optimization.CrossEntropy(4, smoothing)
        targets = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4
        expected = -(targets * log_probabilities).sum(axis=1).mean()
        assert float(loss(labels, logits)) == pytest.approx(expected, rel=1e-5)
        assert float(loss(labels[:, None], logits)) == pytest.approx(expected, rel=1e-5)


def tiny_trainer(units=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, name="dense")])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), optimization.CrossEntropy(units))
    return model


def fit(model, folder, epochs):
    generator = np.random.default_rng(0)
    saving = checkpoints.Checkpoints(folder, model)
    x, y = generator.normal(size=(32, 4)), generator.integers(0, 3, 32)
    model.fit(x, y, 8, epochs, initial_epoch=saving.first_epoch, shuffle=False, verbose=0, callbacks=[saving])
    return saving.first_epoch


def test_training_continues_as_if_nothing_had_happened(tmp_path):
    uninterrupted, first, second = tiny_trainer(), tiny_trainer(), tiny_trainer()
    assert fit(uninterrupted, tmp_path / "a", 4) == 0
    assert fit(first, tmp_path / "b", 2) == 0
    assert fit(second, tmp_path / "b", 4) == 2
    assert int(second.optimizer.iterations) == 16
    for actual, expected in zip(second.get_weights(), uninterrupted.get_weights(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert checkpoints.Checkpoints(tmp_path / "b", tiny_trainer()).first_epoch == 4


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path):
    fit(tiny_trainer(), tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"is damaged or of another network.*delete .* to start over"):
        checkpoints.Checkpoints(tmp_path / "a", tiny_trainer(units=5))
    for path in (tmp_path / "a").rglob("*.index"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged or of another network"):
        checkpoints.Checkpoints(tmp_path / "a", tiny_trainer())


def test_checkpoints_of_an_older_version_are_not_passed_over(tmp_path):
    (tmp_path / "checkpoint").touch()
    with pytest.raises(ValueError, match="holds no checkpoint that this version reads; delete it to start over"):
        checkpoints.Checkpoints(tmp_path, tiny_trainer())


@pytest.mark.parametrize("minutes", [0, 60, 1e-9])
def test_checkpoints_within_an_epoch(tmp_path, minutes):
    """Stopped in the middle of an epoch, and continued there: the weights and logs of an uninterrupted run."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64, 4)), generator.integers(0, 3, 64)

    def train(name, stop_at=None):
        model = tiny_trainer()
        saving = checkpoints.Checkpoints(tmp_path / name, model, minutes)
        remaining = slice(8 * saving.first_step, None)
        stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, _: 1 / (batch != stop_at))
        log = logs.MetricsLog(tmp_path / f"{name}.jsonl", saving.first_epoch, saving.seconds_before)
        model.fit(x[remaining], y[remaining], 8, shuffle=False, verbose=0, callbacks=[log, saving, stop])
        return model, saving, json.loads((tmp_path / f"{name}.jsonl").read_text())

    whole, _, expected_metrics = train("whole")
    with pytest.raises(ZeroDivisionError):
        train("stopped", stop_at=4)
    continued, saving, metrics = train("stopped")
    assert (saving.first_epoch, saving.first_step) == ((0, 5) if minutes == 1e-9 else (0, 0))
    assert (saving.seconds_before > 0) == (minutes == 1e-9)
    assert metrics["loss"] == expected_metrics["loss"]
    for actual, expected in zip(continued.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_metrics_log_is_one_line_per_epoch_even_after_interruptions(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def log(first, last, epochs_done):
        metrics_log = logs.MetricsLog(path, epochs_done)
        for epoch in range(first, last):
            metrics_log.on_epoch_begin(epoch)
            metrics_log.on_epoch_end(epoch, {"loss": 0.5, "top1": 0.25, "val_top1": 0.125})

    log(0, 3, 0)
    with open(path, "a") as file:
        file.write('{"epoch": 4, "sec')  # cut off while writing, and epoch 3 before its checkpoint
    log(2, 4, 2)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    expected = {"loss": 0.5, "top1_percent": 25.0, "val_top1_percent": 12.5}
    assert all(expected.items() <= record.items() for record in records)
    assert all(record["seconds"] >= 0 for record in records)


def test_progress_bar_counts_the_whole_run(capfd):
    with logs.ProgressBar(steps_per_epoch=5, epochs=4, first_epoch=1) as bar:
        for epoch in range(1, 4):
            bar.on_epoch_begin(epoch)
            for batch in range(5):
                bar.on_train_batch_end(batch)
            bar.on_epoch_end(epoch, {"loss": 0.5})
    printed = capfd.readouterr().err
    assert "20/20" in printed
    assert "epoch 4/4" in printed
    assert "loss=0.5000" in printed


def test_training_stops_before_anything_that_is_not_finite_is_saved(tmp_path):
    model = tiny_trainer()
    fit(model, tmp_path / "run", 1)
    saving = checkpoints.Checkpoints(tmp_path / "run", model)
    x, y = np.full((8, 4), np.nan), np.zeros(8)
    with pytest.raises(FloatingPointError, match=r"the loss became nan at step 5$"):
        model.fit(x, y, 4, 2, initial_epoch=1, verbose=0, callbacks=[divergence.StopOnNaN(), saving])
    again = tiny_trainer()
    assert checkpoints.Checkpoints(tmp_path / "run", again).first_epoch == 1
    assert all(np.all(np.isfinite(weight)) for weight in again.get_weights())


def test_weights_spoilt_by_the_last_step_stop_training_too():
    model = tiny_trainer()
    spoil = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_: model.layers[-1].bias.assign([np.inf, 0, 0]))
    with pytest.raises(FloatingPointError, match=r"bias:0 holds infinities or NaN at step 1"):
        model.fit(np.zeros((4, 4)), np.zeros(4), 4, verbose=0, callbacks=[spoil, divergence.StopOnNaN()])


@pytest.mark.parametrize("block", BLOCKS)
def test_penalty_on_merged_kernels(block):
    """The penalty is in the loss with its weight, and shrinks the channel with the largest kernel most."""
    variant = Variant(4, (4,), (2,), stem_stride=1, strides=(1,), family=block.removeprefix("qa"))
    model = build_network(variant, (8, 8, 3), 10, block=block)
    stem, *others = blocks = [layer for layer in model.layers if isinstance(layer, ReparameterizedBlock)]
    optimization.penalize_merged_kernels(model, 0.5)
    assert len(others) == (2 if "repvgg" in block else 4) and len(model.losses) == len(blocks)
    expected = sum(np.sum(np.square(block.equivalent_kernel_and_bias()[0])) for block in blocks)
    np.testing.assert_allclose(sum(model.losses), 0.25 * expected, rtol=1e-5)

    norm = {"repvgg": "norm3x3", "mobileone": "norm1"}.get(block, "norm_sum")
    gamma = getattr(stem, norm).gamma
    gamma.assign([1.0, 1.0, -10.0, 1.0])
    with tf.GradientTape() as tape:
        penalty = tf.add_n(model.losses)
    shrinkage = tape.gradient(penalty, gamma).numpy() * np.sign(gamma.numpy())
    assert np.argmax(shrinkage) == 2 and shrinkage[2] > 0
