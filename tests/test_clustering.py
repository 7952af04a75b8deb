"""ClusterQAT: a codebook that moves, exact codes in the file, tfmot's API, and every stage saved and loaded."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from helpers.networks import SIZE, assert_file_computes_the_model, every_layer, fit, random_images, small_repvgg
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation

from tf_repvgg import graph, tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.quantization import cluster_quantize, codebooks, quantizers, strip_cluster_quantize
from tf_repvgg.quantization.qat.clustering import ClusterLog, ClusterQuantize, FreezeClusters

CentroidInitialization = tfmot.clustering.keras.CentroidInitialization


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


def wrappers(model):
    return {layer.layer.name: layer for layer in model.layers if isinstance(layer, ClusterQuantize)}


def kernels_of(model):
    model(random_images())  # after training, the layers hold tensors of its graph
    return [wrapper.layer.kernel.numpy() for wrapper in wrappers(model).values()]


def states_of(codes, per_channel):
    columns = codes.reshape(-1, codes.shape[-1]).T if per_channel else [codes]
    return max(len(np.unique(column)) for column in columns)


def brute_force(weights, centroids):
    """Nearest centroids by looking at all of them."""
    books = np.broadcast_to(centroids, [weights.shape[1], centroids.shape[1]])
    distance = np.abs(weights[..., np.newaxis].astype(np.float64) - books)
    return np.min(distance, axis=-1), distance


@given(st.integers(2, 256), st.booleans(), st.integers(0, 1000))
def test_nearest_centroids(states, per_channel, seed):
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal([37, 6]).astype("float32")
    centroids = np.sort(generator.standard_normal([6 if per_channel else 1, states]).astype("float32"))
    smallest, distance = brute_force(weights, centroids)
    found = codebooks.assign(weights, tf.constant(centroids)).numpy()
    np.testing.assert_allclose(np.take_along_axis(distance, found[..., np.newaxis], -1)[..., 0], smallest, atol=1e-6)
    values = codebooks.nearest(tf.constant(weights), tf.constant(centroids))
    np.testing.assert_array_equal(values, codebooks.look_up(tf.constant(centroids), found))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_lloyd_step_by_its_definition(per_channel):
    weights = np.random.default_rng(0).standard_normal([50, 3]).astype("float32")
    centroids = np.tile(np.float32([[-1, 0, 0.5, 2]]), [3 if per_channel else 1, 1])
    found = codebooks.lloyd_step(weights, tf.constant(centroids), 0.25).numpy()
    for row, book in enumerate(centroids):
        own = weights[:, row] if per_channel else weights.ravel()
        nearest = np.argmin(np.abs(own[:, np.newaxis] - book), axis=1)
        means = np.array([own[nearest == state].mean() for state in range(4)])
        np.testing.assert_allclose(found[row], book + 0.25 * (means - book), rtol=1e-5)


def test_empty_clusters_start_anew():
    weights = np.float32([[-1.0, -1.2, 3.0, 5.0, 7.0, 9.0]]).T
    centroids = tf.constant([[-1.0, 6.0, 50.0, 60.0]])
    for _ in range(20):
        centroids = codebooks.lloyd_step(weights, centroids, 1.0)
    indices = codebooks.assign(weights, centroids)
    assert len(np.unique(indices)) == 4
    distance, counts = codebooks.inertia_and_counts(weights, centroids, indices)
    assert distance < 10 and np.all(counts > 0)


@pytest.mark.parametrize("states, per_channel", [(4, False), (4, True), (40, False), (40, True)])
def test_layers_of_all_shapes_share_a_graph(states, per_channel):
    """Variables, too, which would bring their shape along; and it is to compute what its functions compute."""
    generator = np.random.default_rng(0)
    for rows, channels in ((50, 3), (90, 7), (60, 1), (50, 8)):
        weights = tf.Variable(generator.standard_normal([rows, channels]).astype("float32"))
        book = generator.standard_normal([channels if per_channel else 1, states]).astype("float32")
        centroids, ascending = tf.Variable(book), tf.constant(np.sort(book))
        numbers = generator.integers(0, states, [rows, channels]).astype("uint8")
        assignments = tf.Variable(numbers, trainable=False)
        for is_true in (False, True):
            found = codebooks.quantize(weights, ascending, tf.constant(is_true), assignments)
            held = codebooks.look_up(ascending, tf.cast(assignments, tf.int32))
            np.testing.assert_array_equal(found, held if is_true else codebooks.nearest(weights, ascending))
            moved = codebooks.lloyd_step_if(tf.constant(is_true), weights, centroids, 0.5)
            expected = codebooks.lloyd_step(tf.convert_to_tensor(weights), ascending, 0.5) if is_true else centroids
            np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_gradients():
    weights = tf.constant([[-1.0], [-0.9], [2.0], [5.0]])
    centroids = tf.constant([[-1.0, 1.0, 4.0]])
    upstream = tf.constant([[1.0], [3.0], [10.0], [20.0]])
    assignments = tf.constant([[0], [0], [1], [2]], tf.uint8)
    quantize = functools.partial(codebooks.quantize, is_frozen=tf.constant(False), assignments=assignments)
    for aggregation, expected in ((None, None), ("sum", [[4.0, 10.0, 20.0]]), ("mean", [[2.0, 10.0, 20.0]])):
        with tf.GradientTape() as tape:
            tape.watch([weights, centroids])
            values = quantize(weights, codebooks.on_grid(centroids), aggregation=aggregation)
            total = tf.reduce_sum(values * upstream)
        to_weights, to_centroids = tape.gradient(total, [weights, centroids])
        np.testing.assert_array_equal(to_weights, upstream)
        assert (expected is None and to_centroids is None) or np.array_equal(to_centroids, expected)


@pytest.mark.parametrize(
    "states, per_channel, options",
    [
        (2, False, {}),
        (3, True, {"train_centroids": True}),
        (8, False, {"cluster_centroids_init": CentroidInitialization.KMEANS_PLUS_PLUS}),
        (5, True, {"cluster_centroids_init": CentroidInitialization.LINEAR, "centroid_update_steps": 1}),
        (40, False, {"train_centroids": True, "cluster_gradient_aggregation": GradientAggregation.AVG}),
        (256, True, {}),
    ],
)
def test_from_training_to_the_file(model, states, per_channel, options):
    """At most the asked number of codes, those of training, and the same function at every stage."""
    clustered = fit(cluster_quantize(model, states, cluster_per_channel=per_channel, **options))
    stripped = strip_cluster_quantize(clustered)
    np.testing.assert_array_equal(stripped(random_images()), clustered(random_images()))
    file = tflite.convert(stripped)
    assert [operator.name for operator in tflite.operators(file)] == [
        "CONV_2D",
        "CONV_2D",
        "MEAN",
        "FULLY_CONNECTED",
    ]
    for (name, wrapper), found in zip(wrappers(clustered).items(), tflite.weight_codes(file), strict=True):
        assert states_of(found.codes, per_channel) <= states
        ((weights, centroids, indices),) = wrapper.clusters().values()
        trained = codebooks.look_up(centroids, indices).numpy()
        np.testing.assert_array_equal(trained, codebooks.nearest(weights, centroids))
        shape = (-1, found.codes.shape[-1])
        np.testing.assert_array_equal(found.dequantize().reshape(shape), trained, err_msg=name)
        assert len(found.scale) == (found.codes.shape[-1] if per_channel else 1)
    assert_file_computes_the_model(stripped, file, random_images(8, seed=1))


def test_centroids_follow_the_weights(model):
    clustered = cluster_quantize(model, 4, centroid_update_rate=1.0, centroid_update_steps=1)
    wrapper = wrappers(clustered)["second"]
    centroids, kernel = wrapper.cluster_centroids["kernel"], wrapper.original_clusterable_weights["kernel"]
    before = centroids.numpy()
    kernel.assign(kernel + 1.0)
    clustered(random_images(), training=False)
    np.testing.assert_array_equal(centroids, before)
    for _ in range(40):
        clustered(random_images(), training=True)
    assert np.all(centroids.numpy() > before)
    rests = codebooks.lloyd_step(tf.reshape(kernel, [-1, 8]), tf.convert_to_tensor(centroids), 1.0)
    np.testing.assert_allclose(centroids, rests, rtol=1e-6)


def test_still_centroids(model):
    """Without moves of their own, centroids rest while weights train."""
    clustered = cluster_quantize(model, 4, centroid_update_rate=0.0)
    before = {name: wrapper.cluster_centroids["kernel"].numpy() for name, wrapper in wrappers(clustered).items()}
    latent = wrappers(clustered)["second"].original_clusterable_weights["kernel"].numpy()
    fit(clustered)
    for name, wrapper in wrappers(clustered).items():
        np.testing.assert_array_equal(wrapper.cluster_centroids["kernel"], before[name])
    assert np.any(wrappers(clustered)["second"].original_clusterable_weights["kernel"].numpy() != latent)


def test_freezing(model):
    clustered = cluster_quantize(model, 4, centroid_update_steps=1)
    fit(clustered, epochs=2, learning_rate=0.1, callbacks=[FreezeClusters(step=4)])
    kernels = kernels_of(clustered)
    ranges = [quantizer.range.numpy() for quantizer in quantizers(clustered)]
    biases = clustered.get_layer("cluster_second").layer.bias.numpy()
    fit(clustered, epochs=2, learning_rate=0.1)
    for kernel, expected in zip(kernels_of(clustered), kernels, strict=True):
        np.testing.assert_array_equal(kernel, expected)
    np.testing.assert_array_equal(ranges, [quantizer.range.numpy() for quantizer in quantizers(clustered)])
    assert np.any(biases != clustered.get_layer("cluster_second").layer.bias.numpy())
    for wrapper in wrappers(clustered).values():
        wrapper.freeze(False)
    fit(clustered, learning_rate=0.1)
    assert any(np.any(now != before) for now, before in zip(kernels_of(clustered), kernels, strict=True))


def test_weights_keep_their_centroid_while_clusters_rest():
    """Wherever the optimizer moves that, past its neighbours too, and wherever momentum moves the latent weights."""
    wrapper = ClusterQuantize(keras.layers.Dense(8), 4, train_centroids=True)
    wrapper.build((None, 30))
    wrapper.freeze()
    _, before, indices = wrapper.clusters()["kernel"]
    centroids = wrapper.cluster_centroids["kernel"]
    centroids.assign(centroids.numpy()[:, [0, 2, 1, 3]])
    wrapper.original_clusterable_weights["kernel"].assign(np.zeros([30, 8]))
    _, after, kept = wrapper.clusters()["kernel"]
    np.testing.assert_array_equal(after, before.numpy()[:, [0, 2, 1, 3]])
    np.testing.assert_array_equal(kept, indices)
    outputs = wrapper(np.eye(30, dtype="float32"), training=True)
    np.testing.assert_allclose(outputs, codebooks.look_up(after, indices), rtol=1e-6)


def test_quantization_sets_in_gradually(tmp_path):
    """In training, weights are on their way to the centroids, and gradients pass whole; elsewhere they are there."""
    inputs = keras.Input((40,))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(inputs))
    batch = random_images(16, (40,))
    clustered = cluster_quantize(model, 3, ramp_steps=4, centroid_update_rate=0.0, activation_bits=None)
    in_float, quantized = model(batch), clustered(batch)
    for share in (0.25, 0.5):
        with tf.GradientTape() as tape:
            mixed = clustered(batch, training=True)
            total = tf.reduce_sum(mixed)
        np.testing.assert_allclose(mixed, share * quantized + (1 - share) * in_float, atol=1e-5)
        (kernel,) = wrappers(clustered)["dense"].original_clusterable_weights.values()
        expected = np.broadcast_to(batch.sum(axis=0)[:, np.newaxis], kernel.shape)
        np.testing.assert_allclose(tape.gradient(total, kernel), expected, rtol=1e-5)
        np.testing.assert_array_equal(clustered(batch), quantized)
    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_allclose(loaded(batch, training=True), 0.75 * quantized + 0.25 * in_float, atol=1e-5)
    for _ in range(2):
        np.testing.assert_array_equal(loaded(batch, training=True), quantized)
    wrappers(clustered)["dense"].freeze()
    np.testing.assert_array_equal(clustered(batch, training=True), quantized)


def test_quantization_sets_in_gradually_in_training_form():
    model = blocks_in_training_form(RepVGGBlock)
    clustered = cluster_quantize(
        model, 3, ramp_steps=3, batch_norm_statistics="frozen", centroid_update_rate=0.0, activation_bits=None
    )
    quantized = clustered(random_images())
    distances = [np.max(np.abs(clustered(random_images(), training=True) - quantized)) for _ in range(3)]
    assert distances[0] > distances[1] > distances[2] == 0


@pytest.mark.parametrize("train_centroids", [False, True])
def test_saved_and_loaded_in_the_middle_of_training(model, train_centroids, tmp_path):
    clustered = fit(cluster_quantize(model, 4, cluster_per_channel=True, train_centroids=train_centroids))
    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    assert [w.shape for w in loaded.trainable_weights] == [w.shape for w in clustered.trainable_weights]
    fit(loaded), fit(clustered)
    np.testing.assert_allclose(loaded(random_images()), clustered(random_images()), rtol=1e-5, atol=1e-6)
    stripped = strip_cluster_quantize(loaded)
    stripped.save(tmp_path / "s.keras")
    assert tflite.convert(keras.models.load_model(tmp_path / "s.keras")) == tflite.convert(stripped)


@pytest.mark.parametrize("per_channel", [False, True])
def test_any_functional_model(per_channel):
    model = every_layer()
    clustered = cluster_quantize(
        model, "dense=16,.*=3", cluster_per_channel=per_channel, calibration=random_images(8, (8, 8, 3))
    )
    stripped = strip_cluster_quantize(clustered)
    batch = random_images(4, (8, 8, 3), seed=1)
    np.testing.assert_array_equal(stripped(batch), clustered(batch))
    conv, depthwise, dense = tflite.weight_codes(tflite.convert(stripped))
    assert states_of(conv.codes, per_channel) == states_of(depthwise.codes, per_channel) == 3
    assert 3 < states_of(dense.codes, per_channel) <= 16


def test_tfmot_strips_it_too(model):
    clustered = fit(cluster_quantize(model, 4))
    stripped = tfmot.clustering.keras.strip_clustering(clustered)
    np.testing.assert_array_equal(stripped(random_images()), clustered(random_images()))
    assert type(stripped.get_layer("second")) is keras.layers.Conv2D
    assert states_of(stripped.get_layer("second").kernel.numpy(), False) == 4


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.Layer, tfmot.clustering.keras.ClusterableLayer):
    """A layer of a user's own."""

    algorithm = None

    def build(self, input_shape):
        self.offset = self.add_weight("offset", input_shape[-1:])
        self.factor = self.add_weight("factor", [input_shape[-1]], initializer="random_normal")
        super().build(input_shape)

    def call(self, inputs):
        return inputs * self.factor + self.offset

    def get_clusterable_weights(self):
        return [("factor", self.factor)]

    def get_clusterable_algorithm(self, weight_name):
        return self.algorithm


def test_layers_of_ones_own():
    inputs = keras.Input((40,))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(Scaled(name="own")(inputs)))
    clustered = cluster_quantize(model, "own=2,.*=16")
    batch = random_images(16, (40,))
    clustered.compile("sgd", "mse")
    clustered.fit(batch, np.ones([16, 5]), verbose=0)
    for stripped in (strip_cluster_quantize(clustered), tfmot.clustering.keras.strip_clustering(clustered)):
        np.testing.assert_allclose(stripped(batch), clustered(batch), rtol=1e-6)
        assert type(stripped.get_layer("own")) is Scaled
        assert len(np.unique(stripped.get_layer("own").factor)) == 2
    model.get_layer("own").algorithm = object
    with pytest.raises(ValueError, match="'own' brings its own clustering algorithm"):
        cluster_quantize(model, 4)


@keras.saving.register_keras_serializable(package="tests")
class ConvolutionOfOnesOwn(keras.layers.Conv2D, tfmot.clustering.keras.ClusterableLayer):
    """A subclass, which may do more with its kernel than a Conv2D."""

    def get_clusterable_weights(self):
        return [("kernel", self.kernel)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_codes_of_a_subclass_are_those_of_the_file(per_channel):
    inputs = keras.Input(SIZE)
    features = ConvolutionOfOnesOwn(8, 3, activation="relu", name="own")(inputs)
    features = keras.layers.Dense(5, name="dense")(keras.layers.GlobalAveragePooling2D()(features))
    clustered = cluster_quantize(keras.Model(inputs, features), 6, cluster_per_channel=per_channel)
    stripped = strip_cluster_quantize(fit(clustered))
    kernel = stripped.get_layer("own").kernel.numpy()
    codes = next(found for found in tflite.weight_codes(tflite.convert(stripped)) if found.codes.shape == kernel.shape)
    np.testing.assert_allclose(codes.dequantize(), kernel, atol=1e-6)
    assert states_of(codes.codes, per_channel) == states_of(kernel, per_channel) == 6


def test_layers_that_do_not_train(tmp_path):
    """They are clustered all the same, rest, and are saved, loaded and stripped."""
    fused = small_repvgg()
    fused.get_layer("first").trainable = False
    clustered = cluster_quantize(fused, 4, calibration=random_images())
    before = wrappers(clustered)["first"].clusters()["kernel"][0].numpy()
    fit(clustered)
    np.testing.assert_array_equal(wrappers(clustered)["first"].clusters()["kernel"][0], before)
    assert all(states_of(kernel, False) == 4 for kernel in kernels_of(clustered))
    clustered.trainable = False
    clustered.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    stripped = strip_cluster_quantize(loaded)
    np.testing.assert_allclose(stripped(random_images()), clustered(random_images()), atol=1e-6)


def blocks_in_training_form(block, **options):
    """A strided block, one with all its branches, and a head, with statistics that are not those of the start."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SIZE)
    features = block(6, strides=2, name="first", **options)(inputs)
    features = block(6, name="second", **options)(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(keras.layers.GlobalAveragePooling2D()(features)))
    for _ in range(3):
        model(random_images(), training=True)
    return model


@pytest.mark.parametrize(
    "block, options",
    [(RepVGGBlock, {"norm": "oabn"}), (RepVGGBlock, {"padding": "symmetric"}), (QARepVGGBlock, {})],
)
@pytest.mark.parametrize("statistics", ["frozen", "running"])
def test_in_training_form(block, options, statistics, tmp_path):
    """The branches train, their merged kernel is quantized, and the stripped model is a plain one."""
    model = blocks_in_training_form(block, **options)
    clustered = cluster_quantize(model, 8, batch_norm_statistics=statistics, calibration=random_images())
    wrapper = clustered.get_layer("cluster_second")
    kernel, _ = model.get_layer("second").equivalent_kernel_and_bias()
    np.testing.assert_array_equal(wrapper.clusters()["kernel"][0], tf.reshape(kernel, [-1, 6]))
    norm = wrapper.layer.norm3x3
    before = [norm.moving_mean.numpy(), norm.gamma.numpy(), wrapper.layer.conv1x1.kernel.numpy()]
    fit(clustered, learning_rate=0.01)
    after = [norm.moving_mean.numpy(), norm.gamma.numpy(), wrapper.layer.conv1x1.kernel.numpy()]
    moved = [bool(np.any(one != other)) for one, other in zip(before, after, strict=True)]
    assert moved == [statistics == "running", True, True]

    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    stripped = strip_cluster_quantize(fit(loaded, epochs=1))
    np.testing.assert_allclose(stripped(random_images()), loaded(random_images()), rtol=1e-5, atol=1e-6)
    assert not any(hasattr(layer, "equivalent_kernel_and_bias") for layer in graph.find_layers(stripped))
    file = tflite.convert(stripped)
    for name, found in zip(("first", "second", "logits"), tflite.weight_codes(file), strict=True):
        assert states_of(found.codes, False) <= 8
        np.testing.assert_array_equal(found.codes, stripped.get_layer(name).quantized_kernel().codes)
    assert_file_computes_the_model(stripped, file, random_images(8, seed=1))


def test_training_form_computes_as_the_deploy_form():
    """With so many clusters that nothing changes but by rounding."""
    model = blocks_in_training_form(RepVGGBlock)
    clustered = cluster_quantize(model, 256, batch_norm_statistics="frozen", activation_bits=None)
    np.testing.assert_allclose(clustered(random_images()), model(random_images()), atol=0.02)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("initialization", [None, *CentroidInitialization])
@pytest.mark.parametrize("kernel", ["zero", "constant", "two values", "one dead channel"])
def test_kernels_with_few_values(kernel, initialization, per_channel):
    inputs = keras.Input((6, 6, 2))
    model = keras.Model(inputs, keras.layers.Conv2D(3, 3, name="conv", bias_initializer="ones")(inputs))
    values = np.zeros([3, 3, 2, 3], "float32")
    if kernel == "constant":
        values += 0.3
    elif kernel == "two values":
        values[1, 1] = -0.25
    elif kernel == "one dead channel":
        values[..., 1:] = np.random.default_rng(0).standard_normal([3, 3, 2, 2])
    model.get_layer("conv").set_weights([values, np.ones(3)])
    batch = random_images(8, (6, 6, 2))
    clustered = cluster_quantize(model, 8, initialization, per_channel, centroid_update_steps=1, calibration=batch)
    for _ in range(3):
        clustered(batch, training=True)
    stripped = strip_cluster_quantize(clustered)
    found = stripped.get_layer("conv").quantized_kernel()
    if kernel != "one dead channel":
        np.testing.assert_allclose(found.dequantize(), values, atol=0.01 if initialization else 1e-6)
    assert states_of(found.codes, per_channel) <= 8
    np.testing.assert_allclose(stripped(batch), clustered(batch), atol=1e-6)
    tflite.convert(stripped)


def test_log(model, tmp_path):
    fit(cluster_quantize(model, 4), callbacks=[ClusterLog(tmp_path, every=2)])
    found = {}
    for path in tmp_path.iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    for what in ("inertia", "empty_clusters", "centroid_0", "centroid_3"):
        assert [step for step, _ in found[f"clusters/second_kernel/{what}"]] == [2, 4, 6, 8]
    assert [step for step, _ in found["clusters/second_kernel/moves_per_step"]] == [4, 6, 8]
    assert all(value > 0 for _, value in found["clusters/second_kernel/inertia"])
    (_, first), *_ = found["clusters/second_kernel/centroid_0"]
    assert first < found["clusters/second_kernel/centroid_3"][0][1]


def test_without_activations(model):
    clustered = cluster_quantize(model, 8, activation_bits=None)
    assert not quantizers(clustered)
    stripped = strip_cluster_quantize(clustered)
    file = tflite.convert(stripped, random_images())
    for found in tflite.weight_codes(file):
        assert states_of(found.codes, False) <= 8


def test_accuracy_survives_training(fused_digits, digits):
    """Three bits per weight, untrained and after an epoch."""

    def top1(model):
        model.compile(metrics=[keras.metrics.SparseCategoricalAccuracy("top1")])
        return model.evaluate(digits.evaluation("test"), verbose=0, return_dict=True)["top1"]

    clustered = cluster_quantize(
        fused_digits, 4, calibration=digits.calibration(64).as_numpy_iterator(), centroid_update_steps=5
    )
    before = top1(clustered)
    steps = digits.steps_per_epoch(32)
    clustered.compile(keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clustered.fit(digits.training(32, range(2)), steps_per_epoch=steps, epochs=2, verbose=0)
    after = top1(clustered)
    assert after > max(before, top1(fused_digits) - 0.04)


def test_a_cluster_starts_anew_where_the_far_weights_are():
    """On either side: an outlier below its cluster is found like one above."""
    for outlier in (-10, 10):
        weights = tf.constant(np.append(np.linspace(0.09, 0.11, 99), outlier).reshape(-1, 1), tf.float32)
        centroids = tf.constant([[0.1, 50.0]])
        for _ in range(3):
            centroids = codebooks.lloyd_step(weights, tf.sort(centroids, axis=-1), 1.0)
        _, counts = codebooks.inertia_and_counts(weights, centroids, codebooks.assign(weights, centroids))
        assert sorted(counts.numpy()[0]) == [1, 99]


def test_trained_centroids_that_lose_their_weights_or_their_order():
    def wrapped(rate):
        layer = keras.layers.Dense(8)
        wrapper = ClusterQuantize(layer, 4, centroid_update_rate=rate, centroid_update_steps=1, train_centroids=True)
        wrapper.build((None, 30))
        return wrapper

    wrapper = wrapped(rate=0)
    start = wrapper.cluster_centroids["kernel"].numpy()
    wrapper.cluster_centroids["kernel"].assign(start + np.float32([[0, 0, 0, 50]]))
    wrapper(np.zeros([1, 30], "float32"), training=True)
    found = wrapper.cluster_centroids["kernel"].numpy()
    np.testing.assert_array_equal(found[0, :3], np.sort(found)[0, :3])
    assert np.max(found) < 1
    wrapper = wrapped(rate=1)
    start = wrapper.cluster_centroids["kernel"].numpy()
    wrapper.cluster_centroids["kernel"].assign(start[:, [1, 0, 2, 3]])
    latent, *_ = wrapper.clusters()["kernel"]
    wrapper(np.zeros([1, 30], "float32"), training=True)
    np.testing.assert_array_equal(wrapper.cluster_centroids["kernel"], codebooks.lloyd_step(latent, start, 1.0))


def test_weights_that_are_no_longer_finite_are_refused(model):
    """Codes would hide them: NaN is nearest to the first centroid."""
    clustered = cluster_quantize(model, 4, centroid_update_rate=0.0, calibration=random_images())
    wrapper = wrappers(clustered)["second"]
    wrapper.original_clusterable_weights["kernel"].assign(np.full(wrapper.layer.kernel.shape, np.nan))
    with pytest.raises(ValueError, match="'second' holds infinities or NaN"):
        strip_cluster_quantize(clustered)
    dense = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    dense.get_layer("dense").set_weights([np.ones([3, 2]), np.full(2, np.nan)])
    with pytest.raises(ValueError, match="'dense' holds infinities or NaN"):
        cluster_quantize(dense, 4)


def test_calibration_is_the_mean_of_its_batches_and_moves_nothing_else():
    inputs = keras.Input((6, 6, 1))
    features = keras.layers.Dropout(0.5)(keras.layers.Conv2D(2, 3, name="first")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="second")(keras.layers.Flatten()(features)))
    batches = [np.full([64, 6, 6, 1], value, "float32") for value in (1, 2, 6)]
    clustered = cluster_quantize(model, 4, calibration=np.concatenate(batches))
    start, *others = quantizers(clustered)
    np.testing.assert_allclose(start.range, [0, 3], rtol=1e-6)
    again = quantizers(cluster_quantize(model, 4, calibration=np.concatenate(batches)))
    for mine, its in zip(others, again[1:], strict=True):  # nothing is dropped out
        np.testing.assert_array_equal(mine.range, its.range)
    assert all(wrapper._codebooks["kernel"]._steps.numpy() == 0 for wrapper in wrappers(clustered).values())
    start.range.assign([0, 1])
    clustered(batches[0])  # calibration is over
    np.testing.assert_array_equal(start.range, [0, 1])


def test_a_plain_model_with_normalizations():
    """Fused, it trains and becomes a file; as it is, it is told so before it trains."""
    size = (8, 8, 1)
    inputs = keras.Input(size)
    features = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    features = keras.layers.ReLU()(keras.layers.BatchNormalization(name="norm")(features))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(keras.layers.GlobalAveragePooling2D()(features)))
    model(random_images(16, size), training=True)
    with pytest.raises(ValueError, match=r"'norm' is a BatchNormalization, .*fuse"):
        cluster_quantize(model, 4)
    clustered = cluster_quantize(fuse(model), 4, calibration=random_images(64, size))
    stripped = strip_cluster_quantize(clustered)
    file = tflite.convert(stripped)
    assert_file_computes_the_model(stripped, file, random_images(16, size, seed=1))
    assert all(states_of(found.codes, False) == 4 for found in tflite.weight_codes(file))


def test_a_model_of_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        clustered = cluster_quantize(small_repvgg(), 4, calibration=random_images())
        assert clustered(random_images()).dtype == tf.float32
        file = tflite.convert(strip_cluster_quantize(fit(clustered)))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert max(states_of(found.codes, False) for found in tflite.weight_codes(file)) <= 4


def test_models_without_images():
    dense = keras.Sequential([keras.Input((40,)), keras.layers.Dense(5, name="dense")])
    clustered = cluster_quantize(dense, 4, calibration=random_images(16, (40,)))
    assert np.all(np.isfinite(clustered(random_images(16, (40,)))))
    left, right = keras.Input((4,)), keras.Input((4,))
    two = keras.Model([left, right], keras.layers.Dense(2, name="dense")(keras.layers.Add()([left, right])))
    with pytest.raises(ValueError, match="calibration images are for models of one input, and this one has 2"):
        cluster_quantize(two, 4, calibration=random_images(4, (4,)))
    batches = [random_images(4, (4,), seed) for seed in range(2)]
    clustered = cluster_quantize(two, 4)
    clustered(batches, training=True)
    stripped = strip_cluster_quantize(clustered)
    np.testing.assert_allclose(stripped(batches), clustered(batches), atol=1e-6)
    with pytest.raises(ValueError, match=r"files are written for models of one input, and 'model.*' has 2"):
        tflite.convert(stripped)


def test_a_shared_layer():
    """One codebook, in both places, and one tensor in the file."""
    inputs = keras.Input(SIZE)
    shared = keras.layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    pooled = keras.layers.GlobalAveragePooling2D()(shared(shared(inputs)))
    clustered = cluster_quantize(keras.Model(inputs, keras.layers.Dense(5, name="dense")(pooled)), 4)
    stripped = strip_cluster_quantize(fit(clustered))
    np.testing.assert_allclose(stripped(random_images()), clustered(random_images()), atol=1e-6)
    file = tflite.convert(stripped)
    assert_file_computes_the_model(stripped, file, random_images(seed=1))
    assert all(states_of(found.codes, False) == 4 for found in tflite.weight_codes(file))


def test_whole_numbers_may_be_numpys(model, tmp_path):
    clustered = cluster_quantize(model, np.int64(5), centroid_update_steps=np.int32(2))
    clustered.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("cluster_first").number_of_clusters == 5
    with pytest.raises(ValueError, match=r"number_of_clusters is 4\.5; it must be a whole number from 2 to 256"):
        ClusterQuantize(keras.layers.Dense(2), 4.5)


def test_bad_input(model):
    def refuses(match, model=model, clusters=8, **arguments):
        with pytest.raises(ValueError, match=match):
            cluster_quantize(model, clusters, **arguments)

    for bad in (1, 257, "x", 4.5):
        refuses("numbers of clusters are .* must be a whole number from 2 to 256", clusters=bad)
    refuses("'secnd' of numbers of clusters matches no layer; there are: second", clusters="secnd=4,.*=8")
    refuses("no pattern of numbers of clusters matches layer 'second'", clusters="first=4")
    refuses("pattern 'first' of numbers of clusters comes too late", clusters=".*=8,first=4")
    refuses("cluster_gradient_aggregation is 'sum'; known: .*SUM", cluster_gradient_aggregation="sum")
    refuses("cluster_gradient_aggregation is None; known: .*SUM", cluster_gradient_aggregation=None)
    refuses("activation bits are 0; known: 8, 16", activation_bits=0)
    refuses("cluster_centroids_init is 'linear'; known: .*LINEAR", cluster_centroids_init="linear")
    refuses("centroid_update_rate is 1.5; it must be from 0 to 1", centroid_update_rate=1.5)
    refuses("centroid_update_steps is 0; it must be a whole number above 0", centroid_update_steps=0)
    refuses("ramp_steps is -1; it must be a whole number, 0 for none", ramp_steps=-1)
    refuses("there are no calibration images", calibration=[])
    refuses("but got Sequential", keras.Sequential([keras.layers.Dense(3)]))
    from tf_repvgg.models import build_repvgg

    training_form = build_repvgg("digits", (8, 8, 1), 10)
    refuses("is still in training form", training_form)
    refuses("batch_norm_statistics is 'x'; known: frozen, running", training_form, batch_norm_statistics="x")
    with_se = blocks_in_training_form(RepVGGBlock, se_reduction=2)
    refuses("'first' has a squeeze-and-excite, .*fuse", with_se, batch_norm_statistics="frozen")
    inputs = keras.Input(SIZE)
    with_norm = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(inputs))
    refuses("'norm' is a BatchNormalization", with_norm, batch_norm_statistics="frozen")
    transposed = keras.Sequential([keras.Input(SIZE), keras.layers.Conv2DTranspose(2, 3, name="up")])
    refuses("'up' is a Conv2DTranspose, whose weights cannot be trained quantized; .* ClusterableLayer can", transposed)
    broken = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="broken")])
    broken.get_layer("broken").set_weights([np.full([3, 2], np.nan), np.zeros(2)])
    refuses("'broken' holds infinities or NaN", broken)
    with pytest.raises(
        ValueError, match=r"'cluster_first' is still in training; call .*strip_cluster_quantize\(model\)"
    ):
        tflite.convert(cluster_quantize(model, 4, calibration=random_images()))
    with pytest.raises(ValueError, match="holds nothing that strip_cluster_quantize strips; was it made for training"):
        strip_cluster_quantize(model)
    with pytest.raises(ValueError, match="holds nothing that strip_cluster_quantize strips"):
        fit(keras.models.clone_model(model), callbacks=[ClusterLog("unused")])
