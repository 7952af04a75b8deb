"""OABN: |gamma_hat / sqrt(running variance + epsilon)| <= k always, and plain batch normalization at k = infinity."""

import copy
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.blocks import clip_ratio
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg.layers import CLIP_MODES, OutlierAwareBatchNormalization

SLACK = 1 + 1e-6
CHANNELS = 5


def make_norm(channels=CHANNELS, **kwargs):
    norm = OutlierAwareBatchNormalization(**kwargs)
    norm.build((None, 4, 4, channels))
    return norm


def small_model(k=0.1, clip_mode="project", **kwargs):
    inputs = keras.Input((6, 6, CHANNELS))
    norm = OutlierAwareBatchNormalization(k=k, clip_mode=clip_mode, momentum=0.5, name="norm", **kwargs)
    outputs = keras.layers.Dense(3, dtype="float32")(keras.layers.GlobalAveragePooling2D()(norm(inputs)))
    return keras.Model(inputs, outputs)


def small_batch(seed=0, count=16):
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.uniform(-2, 1, CHANNELS)
    images = (generator.standard_normal((count, 6, 6, CHANNELS)) * scale).astype("float32")
    return images, generator.integers(0, 3, count)


finite = {"allow_nan": False, "allow_subnormal": False, "width": 32}


@given(
    gamma=st.lists(st.floats(-1e4, 1e4, **finite), min_size=CHANNELS, max_size=CHANNELS),
    variance=st.lists(st.floats(0, 1e6, **finite), min_size=CHANNELS, max_size=CHANNELS),
    k=st.floats(1e-4, 1e3),
    mode=st.sampled_from(CLIP_MODES),
)
def test_bound_and_clip_of_any_gamma(gamma, variance, k, mode):
    norm = make_norm(k=k, clip_mode=mode)
    norm.set_weights([np.float32(gamma), np.zeros(CHANNELS), np.zeros(CHANNELS), np.float32(variance)])
    assert np.all(clip_ratio(norm) <= k * SLACK)
    limit = k * np.sqrt(np.float64(np.float32(variance)) + norm.epsilon)
    np.testing.assert_allclose(norm.effective_gamma(), np.clip(gamma, -limit, limit), rtol=1e-6, atol=1e-30)
    # The inference output moves by gamma_hat / sigma when the input moves by one.
    images = np.stack([np.zeros((4, 4, CHANNELS)), np.ones((4, 4, CHANNELS))]).astype("float32")
    at_zero, at_one = norm(images, training=False).numpy()
    assert np.all(np.abs(at_one - at_zero) <= k * (1 + 1e-5))


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_bound_after_every_step_of_a_custom_loop(mode):
    model = small_model(k=0.3, clip_mode=mode)
    norm = model.get_layer("norm")
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(labels, model(images, training=True), from_logits=True)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    stored = []
    for index in range(12):
        step(*small_batch(index))
        assert np.all(clip_ratio(norm) <= 0.3 * SLACK)
        stored.append(norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon))
    assert np.all(np.isfinite(stored))
    if mode == "project":
        assert np.max(np.abs(stored)) <= 0.3 * SLACK


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_bound_after_every_step_of_fit(mode):
    model = small_model(k=0.2, clip_mode=mode)
    ratios = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: ratios.append(clip_ratio(model.get_layer("norm")).max())
    )
    model.compile(keras.optimizers.Adam(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*small_batch(count=64), batch_size=8, epochs=2, verbose=0, callbacks=[record])
    assert len(ratios) == 16
    assert max(ratios) <= 0.2 * SLACK
    assert max(ratios) > 0.19  # gammas start at 1, so the clip was at work


def test_training_output_uses_the_clipped_gamma():
    """In training mode the batch is normalised by its own variance and scaled by gamma_hat of the running one."""
    norm = make_norm(k=0.1, epsilon=1e-9)
    norm.moving_variance.assign([0.01, 0.1, 1, 10, 100])
    gamma_hat = norm.effective_gamma().numpy()
    images = np.random.default_rng(0).standard_normal((32, 4, 4, CHANNELS)).astype("float32")
    outputs = norm(images, training=True).numpy()
    # Standard deviations of the outputs are |gamma_hat| up to epsilon.
    np.testing.assert_allclose(outputs.std(axis=(0, 1, 2)), np.abs(gamma_hat), rtol=1e-3)
    np.testing.assert_allclose(gamma_hat, [0.01, 0.0316228, 0.1, 0.316228, 1.0], rtol=1e-5)


def test_bound_under_averaged_weights():
    model = small_model(k=0.25)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=None)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.get_layer("norm").gamma.assign(np.full(CHANNELS, 3.0))
    for seed in range(3):
        model.train_on_batch(*small_batch(seed))
    last = model.get_layer("norm").gamma.numpy()
    optimizer.finalize_variable_values(model.trainable_variables)
    averaged = model.get_layer("norm").gamma.numpy()
    assert np.any(averaged != last)
    limit = 0.25 * np.sqrt(model.get_layer("norm").moving_variance.numpy() + 1e-3)
    assert np.any(np.abs(averaged) > limit * SLACK)  # the average remembers gammas from before any clip
    assert np.all(clip_ratio(model.get_layer("norm")) <= 0.25 * SLACK)


@pytest.mark.parametrize("form", ["model.keras", "saved_model", "model.h5"])
@pytest.mark.parametrize("mode", ["project", "straight_through"])
def test_bound_and_function_after_save_and_load(tmp_path, form, mode):
    model = small_model(k=0.1, clip_mode=mode)
    generator = np.random.default_rng(0)
    weights = [generator.normal(0, 3, w.shape) for w in model.get_weights()]
    weights[3] = generator.uniform(1e-3, 10, CHANNELS)
    model.set_weights(weights)
    model.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    images, _ = small_batch()
    np.testing.assert_array_equal(loaded(images), model(images))
    norm = loaded.get_layer("norm")
    assert isinstance(norm, OutlierAwareBatchNormalization)
    assert (norm.k, norm.clip_mode) == (0.1, mode)
    assert np.all(clip_ratio(norm) <= 0.1 * SLACK)
    np.testing.assert_array_equal(norm.gamma, model.get_layer("norm").gamma)
    # Loaded layers keep on clipping what is stored, in project mode.
    loaded.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loaded.train_on_batch(*small_batch())
    stored = np.abs(norm.gamma.numpy()) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    assert np.all(clip_ratio(norm) <= 0.1 * SLACK)
    assert (np.max(stored) <= 0.1 * SLACK) == (mode == "project")


@pytest.mark.parametrize("suffix", ["weights.h5", "checkpoint"])
def test_bound_after_loading_weights_of_plain_batch_norm(tmp_path, suffix):
    """Weights of an ordinary batch normalization fit, whatever their gammas, and take effect clipped."""
    plain = keras.Sequential([keras.layers.BatchNormalization(input_shape=(4, 4, CHANNELS))])
    generator = np.random.default_rng(0)
    plain.set_weights([generator.uniform(0.5, 3, CHANNELS) for _ in range(4)])
    plain.save_weights(str(tmp_path / suffix))
    clipped = keras.Sequential([OutlierAwareBatchNormalization(k=0.05, input_shape=(4, 4, CHANNELS))])
    clipped.load_weights(str(tmp_path / suffix))
    for actual, expected in zip(clipped.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert np.all(clip_ratio(clipped.layers[0]) <= 0.05 * SLACK)


def test_training_checkpoint_restores_everything(tmp_path):
    def make():
        model = small_model(k=0.1)
        optimizer = keras.optimizers.Adam(0.01)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        optimizer.build(model.trainable_variables)
        return model, tf.train.Checkpoint(model=model, optimizer=optimizer)

    first, checkpoint = make()
    first.train_on_batch(*small_batch(1))
    path = checkpoint.save(str(tmp_path / "step"))
    expected = [first.train_on_batch(*small_batch(seed)) for seed in (2, 3)]
    second, checkpoint = make()
    checkpoint.restore(path).assert_consumed()
    assert [second.train_on_batch(*small_batch(seed)) for seed in (2, 3)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 6, CHANNELS), (32, CHANNELS)], ids=["fused 4D", "2D"])
@pytest.mark.parametrize("k", [math.inf, "inf"])
def test_infinite_k_is_batch_normalization_bit_for_bit(shape, k):
    generator = np.random.default_rng(0)
    inputs = tf.constant(generator.standard_normal(shape) * 3 + 1, tf.float32)
    upstream = tf.constant(generator.standard_normal(shape), tf.float32)
    weights = [generator.normal(0, 2, CHANNELS) for _ in range(3)] + [generator.uniform(1e-3, 5, CHANNELS)]

    def run(norm, training):
        norm.build(shape)
        norm.set_weights(weights)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = norm(inputs, training=training)
            loss = tf.reduce_sum(outputs * upstream)
        gradients = tape.gradient(loss, [inputs, *norm.trainable_variables])
        return [outputs, *gradients, *norm.get_weights()]

    for training in (True, False):
        actual = run(OutlierAwareBatchNormalization(k=k), training)
        expected = run(keras.layers.BatchNormalization(), training)
        assert len(actual) == len(expected) == 1 + 3 + 4
        for tensor, expected_tensor in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(tensor, expected_tensor)


def test_infinite_k_trains_like_batch_normalization_bit_for_bit():
    def train(norm):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6, 6, CHANNELS)), norm, keras.layers.Flatten(), keras.layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for seed in range(4):
            model.train_on_batch(*small_batch(seed))
        return norm.get_weights()

    actual = train(OutlierAwareBatchNormalization(k=math.inf))
    expected = train(keras.layers.BatchNormalization())
    for weight, expected_weight in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(weight, expected_weight)


def test_a_limit_that_is_not_reached_changes_nothing():
    images, _ = small_batch()
    clipped, plain = OutlierAwareBatchNormalization(k=1e6), keras.layers.BatchNormalization()
    for training in (True, False):
        np.testing.assert_array_equal(clipped(images, training=training), plain(images, training=training))


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_clipped_channel_can_come_back(mode, sign):
    """Gamma is pushed against its limit, then the loss reverses: gamma must leave the limit again."""
    norm = make_norm(k=0.5, clip_mode=mode, momentum=1.0, epsilon=0.0)  # running variance stays 1: the limit is 0.5
    norm.gamma.assign(np.full(CHANNELS, sign * 0.4))
    optimizer = keras.optimizers.SGD(0.05)

    def descend(target):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(norm.effective_gamma() - sign * target))
        optimizer.apply_gradients([(tape.gradient(loss, norm.gamma), norm.gamma)])

    for _ in range(5):
        descend(2.0)
    np.testing.assert_allclose(np.abs(norm.effective_gamma()), 0.5, rtol=1e-6)
    for _ in range(60):
        descend(0.1)
    np.testing.assert_allclose(norm.effective_gamma(), sign * 0.1, atol=0.02)


def test_gradients_of_the_three_clip_modes():
    """Stored gammas: inside, above and below the limit 0.5; with upstream gradients of both signs."""
    gamma = [0.2, 2.0, 2.0, -2.0, -2.0]
    upstream = tf.constant([1.0, 1.0, -1.0, 1.0, -1.0])
    expected = {
        "project": [1.0, 1.0, -1.0, 1.0, -1.0],
        "straight_through": [1.0, 1.0, -1.0, 1.0, -1.0],
        # Descent subtracts the gradient: +1 brings 2.0 back, -1 brings -2.0 back.
        "return_only": [1.0, 1.0, 0.0, 0.0, -1.0],
    }
    for mode in CLIP_MODES:
        norm = make_norm(k=0.5, clip_mode=mode, epsilon=0.0)
        norm.gamma.assign(gamma)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(norm.effective_gamma() * upstream)
        np.testing.assert_array_equal(tape.gradient(loss, norm.gamma), expected[mode])


def test_gamma_gradient_through_the_layer_is_that_of_batch_normalization():
    """dL/dgamma_hat does not depend on gamma, so the straight-through gradient of a clipped gamma is BN's."""
    images, _ = small_batch()

    def compute_gamma_gradient(norm):
        norm.build(images.shape)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(norm(images, training=True) ** 2 * 0 + norm(images, training=True) * images)
        return tape.gradient(loss, norm.trainable_variables[0])

    actual = compute_gamma_gradient(OutlierAwareBatchNormalization(k=0.01, clip_mode="straight_through"))
    np.testing.assert_allclose(actual, compute_gamma_gradient(keras.layers.BatchNormalization()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [0, -1, -0.1, "0", "0std", "-6std", "wide", "std", float("nan"), None])
def test_bad_k(k):
    with pytest.raises(ValueError, match=r"OutlierAwareBatchNormalization: k is .*above 0"):
        OutlierAwareBatchNormalization(k=k)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="clip_mode is 'hard'; known: project"):
        OutlierAwareBatchNormalization(clip_mode="hard")
    with pytest.raises(ValueError, match="scale=False leaves no gamma"):
        OutlierAwareBatchNormalization(scale=False)
    norm = OutlierAwareBatchNormalization(k="6std", name="lonely")
    with pytest.raises(ValueError, match="lonely: k='6std' is relative"):
        norm(np.zeros((2, 4, 4, 3), "float32"))


def test_no_extra_weights():
    clipped, plain = make_norm(k=0.1), keras.layers.BatchNormalization()
    plain.build((None, 4, 4, CHANNELS))
    assert [w.name.split("/")[-1] for w in clipped.weights] == [w.name.split("/")[-1] for w in plain.weights]
    assert [w.shape for w in clipped.trainable_variables] == [w.shape for w in plain.trainable_variables]


def test_no_tensor_sized_extra_work():
    """Every operation that OABN adds to the graph works on [channels] only."""

    def sizes(norm):
        shape = (8, 16, 16, CHANNELS)
        function = tf.function(lambda images: norm(images, training=True))
        graph = function.get_concrete_function(tf.TensorSpec(shape)).graph
        outputs = [tensor for op in graph.get_operations() for tensor in op.outputs]
        return sorted(t.shape.num_elements() for t in outputs if (t.shape.num_elements() or 0) > CHANNELS)

    assert sizes(OutlierAwareBatchNormalization(k=0.1)) == sizes(keras.layers.BatchNormalization())


def test_mixed_bfloat16():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = small_model(k=0.1)
    norm = model.get_layer("norm")
    assert norm.compute_dtype == "bfloat16"
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = norm.gamma.numpy()
    for seed in range(3):
        assert np.isfinite(model.train_on_batch(*small_batch(seed)))
        assert np.all(clip_ratio(norm) <= 0.1 * SLACK)
    assert norm.gamma.dtype == norm.effective_gamma().dtype == tf.float32
    assert np.any(norm.gamma.numpy() != before)
    assert norm(small_batch()[0]).dtype == tf.bfloat16


@pytest.mark.parametrize("shape, axis", [((16, 3, 6, 6), 1), ((16, 3), -1), ((16, 3), 1), ((8, 5, 3), 2)])
def test_other_axes_and_ranks(shape, axis):
    generator = np.random.default_rng(0)
    images = generator.standard_normal(shape).astype("float32")
    clipped, plain = OutlierAwareBatchNormalization(k=0.2, axis=axis), keras.layers.BatchNormalization(axis=axis)
    weights = [generator.normal(0, 2, 3), generator.normal(0, 1, 3), generator.normal(0, 1, 3), np.float32([0.1, 1, 4])]
    for norm in (clipped, plain):
        norm.build(shape)
        norm.set_weights(weights)
    assert np.all(clip_ratio(clipped) <= 0.2 * SLACK)
    # Plain batch normalization with the clipped gamma in its place is what OABN must compute.
    plain.gamma.assign(clipped.effective_gamma())
    np.testing.assert_allclose(clipped(images), plain(images), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(clipped(images, training=True), plain(images, training=True), rtol=1e-5, atol=1e-6)


def test_drop_in_arguments():
    """A user's own constraint and regularizer on gamma work beside the projection, and are serialized."""
    norm = make_norm(
        k=10.0,
        gamma_constraint="non_neg",
        gamma_regularizer=keras.regularizers.L2(0.5),
        gamma_initializer=keras.initializers.Constant(2.0),
    )
    np.testing.assert_allclose(norm.losses, [0.5 * 4 * CHANNELS])
    norm.gamma.assign(norm.trainable_variables[0].constraint(tf.constant([-1.0, 1, 2, 50, 1])))
    np.testing.assert_allclose(norm.gamma, [0, 1, 2, 10 * math.sqrt(1 + 1e-3), 1], rtol=1e-6)
    config = norm.get_config()
    assert config["k"] == 10.0
    again = OutlierAwareBatchNormalization.from_config(config)
    assert again.get_config() == config
    assert type(again.gamma_constraint).__name__ == "NonNeg"


def test_frozen_layer_keeps_the_bound_and_its_statistics():
    norm = make_norm(k=0.1)
    norm.trainable = False
    before = norm.get_weights()
    norm(small_batch()[0], training=True)
    for old, new in zip(before, norm.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.all(clip_ratio(norm) <= 0.1 * SLACK)


def test_layer_can_be_copied_like_its_parent():
    norm = copy.deepcopy(OutlierAwareBatchNormalization(k=0.1))
    norm(small_batch()[0])
    assert np.all(clip_ratio(norm) <= 0.1 * SLACK)
