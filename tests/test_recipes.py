"""Parts of training recipes: averaged weights, mixup, RandAugment, distillation; alone, together, and interrupted."""

import json
import signal

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from PIL import Image

from tf_repvgg import fusion, runs, storage
from tf_repvgg.data import ClassificationData, image_operations, rand_augment
from tf_repvgg.data.augmentation import mixup
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.models import Variant, build_repvgg
from tf_repvgg.training import averages, checkpoints, distillation, optimization

TINY = Variant(8, (8,), (2,), stem_stride=1, strides=(1,))


def some_images(channels, count=4, size=32):
    """Smooth, so that a shift of half a pixel is a small change."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, [count, 4, 4, channels], np.uint8)
    return tf.cast(tf.image.resize(coarse, (size, size)), tf.uint8).numpy()


def assert_equal_weights(actual, expected):
    for actual_weight, expected_weight in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(actual_weight, expected_weight)


# Averaged weights


def make_normalized_model():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile(
        keras.optimizers.SGD(0.3, momentum=0.9), optimization.CrossEntropy(3), metrics=[optimization.make_top1()]
    )
    return model


def examples():
    generator = np.random.default_rng(0)
    return generator.normal(size=(64, 4)).astype("float32"), generator.integers(0, 3, 64)


def test_averages_are_those_of_every_step():
    """All weights are averaged, running statistics too; evaluation uses the averages, and the weights come back.

    The decay grows in the first two steps and is constant from the third.
    """
    decay = 0.3
    model = make_normalized_model()
    average = averages.MovingAverage(model, decay)
    expected, evaluated, last_weights = model.get_weights(), [], []

    def follow(batch, _):
        step = batch + 1
        rate = min(decay, (1 + step) / (10 + step))
        expected[:] = [rate * mean + (1 - rate) * now for mean, now in zip(expected, model.get_weights(), strict=True)]
        last_weights[:] = model.get_weights()

    spy = keras.callbacks.LambdaCallback(on_train_batch_end=follow)
    spy.on_test_begin = lambda logs=None: evaluated.extend(model.get_weights())
    x, y = examples()
    model.fit(x, y, 8, validation_data=(x, y), verbose=0, callbacks=[average, spy])
    for weight, mean, expected_mean in zip(model.weights, average.averages, expected, strict=True):
        np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-5, atol=1e-6, err_msg=weight.name)
    assert_equal_weights(evaluated, [mean.numpy() for mean in average.averages])
    assert_equal_weights(model.get_weights(), last_weights)
    assert any(np.any(last != mean) for last, mean in zip(last_weights, evaluated, strict=True))
    average.replace_weights()
    assert_equal_weights(model.get_weights(), evaluated)


def test_averages_are_checkpointed(tmp_path):
    x, y = examples()

    def fit(name, epochs):
        model = make_normalized_model()
        average = averages.MovingAverage(model, 0.9)
        saving = checkpoints.Checkpoints(tmp_path / name, model, averages=average.averages)
        options = {"initial_epoch": saving.first_epoch, "shuffle": False, "verbose": 0}
        model.fit(x, y, 8, epochs, callbacks=[average, saving], **options)
        return [value.numpy() for value in average.averages]

    expected = fit("whole", 2)
    fit("parts", 1)
    assert_equal_weights(fit("parts", 2), expected)


@pytest.mark.parametrize("clip_mode", ["project", "straight_through"])
def test_averaged_weights_keep_oabns_limit(clip_mode):
    """The averaged gamma exceeds the limit of the averaged variance; the effective gamma, which is fused, does not."""
    k = 0.05
    options = {"norm": "oabn", "oabn_k": k, "clip_mode": clip_mode}
    model = build_repvgg(TINY, (8, 8, 1), 4, **options)
    model.compile(optimization.make_optimizer(0.5, 5, 0), optimization.CrossEntropy(4))
    average = averages.MovingAverage(model, 0.999)
    images = np.random.default_rng(0).normal(size=(80, 8, 8, 1)).astype("float32")
    model.fit(images, np.arange(80) % 4, 16, verbose=0, callbacks=[average])
    average.replace_weights()
    fused = fusion.fuse(model)
    norms = {block.name: block.norm_identity for block in model.layers if getattr(block, "norm_identity", None)}
    assert len(norms) == 2
    for name, norm in norms.items():
        sigma = np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
        assert np.max(np.abs(norm._stored_gamma.numpy()) / sigma) > 1.01 * k
        assert np.max(np.abs(norm.effective_gamma().numpy()) / sigma) <= k * (1 + 1e-6)
        block = model.get_layer(name)
        others = sum(np.asarray(block.branches()[branch][0]) for branch in block.branches() if branch != "identity")
        assert np.max(np.abs(fused.get_layer(name).kernel.numpy() - others)) <= k * (1 + 1e-4)


# Mixup


def test_mixup_mixes_images_and_labels_alike():
    generator = np.random.default_rng(0)
    images, labels = generator.normal(size=(6, 2, 2, 1)).astype("float32"), np.array([0, 1, 2, 0, 1, 2])
    shares = []
    for step in range(200):
        mixed, probabilities = (part.numpy() for part in mixup(images, labels, 3, 0.4, [7, step]))
        share = probabilities[0, 0]
        np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probabilities, share * np.eye(3)[labels] + (1 - share) * np.eye(3)[labels[::-1]])
        shares.append(share)
    again, _ = mixup(images, labels, 3, 0.4, [7, 199])
    np.testing.assert_array_equal(again, mixed)
    # Beta(a, a): mean 1/2, variance 1 / (4 * (2 * a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08)
    assert np.var(shares) == pytest.approx(1 / (4 * 1.8), abs=0.03)
    tiny = [mixup(images, labels, 3, 1e-3, [7, step])[1].numpy() for step in range(20)]
    np.testing.assert_allclose(np.sum(tiny, axis=-1), 1, rtol=1e-6)


def test_loss_and_top1_take_mixed_labels():
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 3, 3, 0])
    mixed = (0.7 * np.eye(4)[labels] + 0.3 * np.eye(4)[labels[::-1]]).astype("float32")
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -((mixed * 0.8 + 0.2 / 4) * log_probabilities).sum(axis=1).mean()
    assert float(optimization.CrossEntropy(4, 0.2)(mixed, logits)) == pytest.approx(expected, rel=1e-5)
    correct = np.mean(np.argmax(logits, axis=1) == labels)
    assert 0 < correct < 1
    for form in (labels, labels[:, None], mixed):
        metric = optimization.make_top1()
        metric.update_state(tf.constant(form), logits)
        assert float(metric.result()) == pytest.approx(correct)


# RandAugment


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", image_operations.OPERATIONS)
def test_operations_change_images_as_far_as_their_strength_says(name, channels):
    operation, largest, _ = image_operations.OPERATIONS[name]
    for pixels in some_images(channels):
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)

        def change(strength, image=image):
            result = operation(image, strength)
            assert (result.size, result.mode) == (image.size, image.mode)
            return np.mean(np.abs(np.asarray(result, float) - np.asarray(image, float)))

        if largest:
            assert change(0) < 1
            # Grey images have no colour to lose.
            assert (change(largest) > 5) == ((name, channels) != ("color", 1)) or name in ("sharpness", "color")
        elif name == "identity":
            assert change(0) == 0
        else:
            assert change(0) > 0


def test_results_of_some_operations():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))

    def result(name, strength):
        return np.asarray(image_operations.OPERATIONS[name][0](image, strength)).astype(int)

    ramp = np.asarray(image).astype(int)
    shift = round(16 * 0.25)
    np.testing.assert_array_equal(result("translate_x", 0.25)[:, :-shift], ramp[:, shift:])
    assert np.all(result("translate_x", 0.25)[:, -shift:] == 128)
    np.testing.assert_array_equal(result("translate_y", 0.25)[:-shift], ramp[shift:])
    np.testing.assert_array_equal(result("posterize", 4), ramp // 16 * 16)
    np.testing.assert_array_equal(result("solarize", 0.5), np.where(ramp < 128, ramp, 255 - ramp))
    np.testing.assert_allclose(result("brightness", -0.5), ramp / 2, atol=1)
    np.testing.assert_array_equal(result("rotate", 90), np.rot90(ramp))


def test_operations_are_drawn_with_equal_chance(monkeypatch):
    drawn = []
    table = [(lambda image, strength, at=at: drawn.append((at, strength)) or image, 2.0, at < 4) for at in range(8)]
    monkeypatch.setattr(image_operations, "OPERATIONS", dict(enumerate(table)))
    generator = np.random.default_rng(0)
    image = some_images(3)[0]
    for _ in range(800):
        rand_augment.augment_image(image, 2, 15, generator)
    counts = np.bincount([at for at, _ in drawn])
    assert counts.sum() == 1600
    np.testing.assert_allclose(counts, 200, atol=50)
    assert {strength for at, strength in drawn if at < 4} == {-1.0, 1.0}
    assert {strength for at, strength in drawn if at >= 4} == {1.0}


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_depends_on_its_seed_alone(channels):
    images = tf.constant(some_images(channels, count=32))
    first, same, other = (rand_augment.rand_augment(images, 2, 9, [5, step]).numpy() for step in (0, 0, 1))
    assert first.shape == images.shape and first.dtype == np.uint8
    np.testing.assert_array_equal(first, same)
    changed = np.any(first != images, axis=(1, 2, 3))
    assert np.mean(changed) > 0.7
    assert np.any(first != other)
    np.testing.assert_array_equal(rand_augment.rand_augment(images, 0, 9, [5, 0]), images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rand_augment_operations": -1}, "number of operations is -1; it must be from 0 to 16"),
        ({"rand_augment_operations": 1, "rand_augment_magnitude": 30.5}, "magnitude is 30.5; it must be from 0 to 30"),
        ({"mixup_alpha": -0.1}, "mixup's alpha is -0.1; it must be 0 or more"),
        ({"mixup_alpha": float("nan")}, "mixup's alpha is nan"),
    ],
)
def test_recipes_of_data_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassificationData("digits", **options)


def test_augmented_batches_depend_on_seed_epoch_and_step_alone():
    recipe = {"rand_augment_operations": 2, "rand_augment_magnitude": 9, "mixup_alpha": 0.3}
    data = ClassificationData("digits", crop_padding=1, **recipe)
    plain = ClassificationData("digits", crop_padding=1)

    def batches(data, *arguments):
        return [tuple(map(np.asarray, batch)) for batch in data.training(128, *arguments)]

    whole, again = batches(data, range(2), None, 4), batches(data, range(2), None, 4)
    continued = batches(data, range(1, 2), None, 4, 1)
    for actual, expected in ((again, whole), (continued, whole[5:])):
        for (images, labels), (expected_images, expected_labels) in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(images, expected_images)
            np.testing.assert_array_equal(labels, expected_labels)
    for images, labels in whole:
        assert images.shape == (128, 8, 8, 1) and labels.shape == (128, 10)
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    shares = {float(np.min(np.max(labels, axis=1))) for _, labels in whole}
    assert len(shares) > 1
    # The same images and labels, each with its neighbour from the end.
    (_, hard), (_, soft) = batches(plain, range(1), None, 1)[0], whole[0]
    assert np.all(soft[np.arange(128), hard] + soft[np.arange(128), hard[::-1]] > 0.99)
    assert data.training(128, range(1), 6).element_spec[0].shape == (128, 6, 6, 1)
    images, labels = next(iter(data.evaluation("validation")))
    assert labels.dtype == tf.int64 and images.shape[1:] == (8, 8, 1)


# Distillation


def test_distillation_loss_is_hintons():
    teacher, student = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")

    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    for temperature in (1.0, 3.0):
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
        loss = float(distillation.distillation_loss(teacher, student, temperature))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert float(distillation.distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_a_student_learns_from_its_teacher():
    """With weight 1 from the teacher alone: the logged loss is the teacher's term, and labels have no effect."""
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 1)).astype("float32")

    def train(labels, weight):
        keras.utils.set_random_seed(0)
        teacher, student = (build_repvgg(TINY, (None, None, 1), 4) for _ in range(2))
        before = teacher.get_weights()
        model = distillation.Distiller(student, teacher, weight, 2.0)
        assert [w.name for w in model.weights] == [w.name for w in student.weights]
        model.compile(keras.optimizers.SGD(0.1), optimization.CrossEntropy(4), loss_weights=1 - weight)
        expected = float(distillation.distillation_loss(teacher(images), model(images, training=True), 2.0))
        loss = model.train_on_batch(images, labels)
        assert_equal_weights(teacher.get_weights(), before)
        return model, expected, loss

    labels, other_labels = np.zeros(8, int), np.arange(8) % 4
    model, expected, loss = train(labels, 1.0)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert_equal_weights(model.get_weights(), train(other_labels, 1.0)[0].get_weights())
    model, expected, loss = train(labels, 0.25)
    hard = (loss - 0.25 * expected) / 0.75
    keras.utils.set_random_seed(0)
    _, student = (build_repvgg(TINY, (None, None, 1), 4) for _ in range(2))
    assert hard == pytest.approx(float(optimization.CrossEntropy(4)(labels, student(images, training=True))), rel=1e-4)
    evaluated = model.evaluate(images, labels, verbose=0)  # the compiled loss alone
    assert evaluated == pytest.approx(0.75 * float(optimization.CrossEntropy(4)(labels, model(images))), rel=1e-4)


@pytest.mark.parametrize(
    "options, message", [({"weight": 1.5}, "weight.*1.5"), ({"temperature": 0}, "must be above 0")]
)
def test_distillation_that_is_refused(options, message):
    model = build_repvgg(TINY, (None, None, 1), 4)
    with pytest.raises(ValueError, match=message):
        distillation.Distiller(model, model, **options)


def test_a_teacher_is_fused_and_takes_any_size(tmp_path, digits, trained_digits):
    trained_digits.save(tmp_path / runs.MODEL_NAME)
    storage.write_json(tmp_path / runs.INPUT_NAME, digits.metadata())
    for path in (tmp_path, tmp_path / runs.MODEL_NAME):
        teacher = distillation.load_teacher(path, digits)
        assert not any(isinstance(layer, ReparameterizedBlock) for layer in teacher.layers)
        images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
        expected = trained_digits.predict(images, verbose=0)
        np.testing.assert_allclose(teacher.predict(images, verbose=0), expected, atol=1e-3 * np.abs(expected).max())
        assert teacher(images[:, :6, :6]).shape == (4, 10)


# All parts together, as a user runs them


def read_metrics(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_everything_together_survives_a_kill(run_forked, tmp_path, digits, trained_digits):
    """AdamW, EMA, mixup, RandAugment, label smoothing, distillation, early crops and bfloat16; deterministic."""
    (tmp_path / "teacher").mkdir()
    trained_digits.save(tmp_path / "teacher" / runs.MODEL_NAME)
    storage.write_json(tmp_path / "teacher" / runs.INPUT_NAME, digits.metadata())
    command = [
        "train/main.py",
        "--flagfile=configs/digits_oabn.flags",
        "--batch_size=256",
        "--deterministic",
        "--validation",
        "--epochs=2",
        "--early_epochs=1",
        "--early_crop=6",
        "--optimizer=adamw",
        "--learning_rate=0.003",
        "--ema=0.9",
        "--mixup=0.2",
        "--randaugment=1",
        "--label_smoothing=0.1",
        f"--distill_from={tmp_path / 'teacher'}",
        "--precision=mixed_bfloat16",
        "--checkpoint_minutes=1e-9",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcome = run_forked(*command, f"--workdir={whole}")
    assert outcome.status == 0, outcome.stderr[-3000:]
    kill = {"folder": str(killed / "checkpoints"), "event": 40, "seconds": 0}
    assert run_forked(*command, f"--workdir={killed}", kill=kill).status == -signal.SIGKILL
    assert list((killed / "checkpoints").iterdir()) and not (killed / "model.keras").exists()
    outcome = run_forked(*command, f"--workdir={killed}")
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert read_metrics(killed) == read_metrics(whole)
    assert {"loss", "top1_percent", "val_loss", "val_top1_percent"} <= read_metrics(whole)[0].keys()
    weights, expected_weights = (runs.load_model(workdir).weights for workdir in (killed, whole))
    for weight, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_array_equal(weight, expected, err_msg=weight.name)
    # The final model is the one that was evaluated last: it holds the averages.
    result = json.loads((whole / "result.json").read_text())
    assert result["top1_percent"] == pytest.approx(read_metrics(whole)[-1]["val_top1_percent"], abs=0.8)
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("ckpt-"))) / "state"
    names = [name for name, _ in tf.train.list_variables(str(last)) if name.startswith("averages/")]
    saved_averages = {tf.train.load_variable(str(last), name).tobytes() for name in names}
    assert len(names) == len(expected_weights)
    assert {weight.numpy().tobytes() for weight in expected_weights} <= saved_averages
