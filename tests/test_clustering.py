"""ClusterQAT: training, freezing, exact codes in the file, saving and loading, and bad arguments."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.clustering import count_clusters, model_in_training_form, read_clustered_kernels, wrappers_by_layer
from helpers.networks import SIZE, assert_file_computes_the_model, fit, random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import cluster_quantize, codebooks, quantizers, strip_cluster_quantize
from tf_repvgg.quantization.qat.clustering import (
    CentroidInitialization,
    ClusterLog,
    ClusterQuantize,
    FreezeClusters,
    GradientAggregation,
)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


@pytest.mark.parametrize(
    "clusters, per_channel, options",
    [
        (2, False, {"cluster_centroids_init": CentroidInitialization.KMEANS_PLUS_PLUS}),
        (5, True, {"cluster_centroids_init": CentroidInitialization.LINEAR, "centroid_update_steps": 1}),
        (40, False, {"train_centroids": True, "cluster_gradient_aggregation": GradientAggregation.AVG}),
        (256, True, {"train_centroids": True}),
    ],
)
def test_from_training_to_the_file(model, clusters, per_channel, options):
    """The file has the codes of training, no more than requested, and every stage computes the same."""
    clustered = fit(cluster_quantize(model, clusters, cluster_per_channel=per_channel, **options))
    stripped = strip_cluster_quantize(clustered)
    np.testing.assert_array_equal(stripped(random_images()), clustered(random_images()))
    file = tflite.convert(stripped)
    assert [operator.name for operator in tflite.operators(file)] == [
        "CONV_2D",
        "CONV_2D",
        "MEAN",
        "FULLY_CONNECTED",
    ]
    for (name, wrapper), kernel in zip(wrappers_by_layer(clustered).items(), tflite.weight_codes(file), strict=True):
        assert count_clusters(kernel.codes, per_channel) <= clusters
        ((weights, centroids, indices),) = wrapper.clusters().values()
        trained = codebooks.look_up(centroids, indices).numpy()
        np.testing.assert_array_equal(trained, codebooks.find_nearest(weights, centroids))
        shape = (-1, kernel.codes.shape[-1])
        np.testing.assert_array_equal(kernel.dequantize().reshape(shape), trained, err_msg=name)
        assert len(kernel.scale) == (kernel.codes.shape[-1] if per_channel else 1)
    assert_file_computes_the_model(stripped, file, random_images(8, seed=1))


def test_centroids_follow_the_weights(model):
    clustered = cluster_quantize(model, 4, centroid_update_rate=1.0, centroid_update_steps=1)
    wrapper = wrappers_by_layer(clustered)["second"]
    centroids, kernel = wrapper.cluster_centroids["kernel"], wrapper.original_clusterable_weights["kernel"]
    before = centroids.numpy()
    kernel.assign(kernel + 1.0)
    clustered(random_images(), training=False)
    np.testing.assert_array_equal(centroids, before)
    for _ in range(40):
        clustered(random_images(), training=True)
    assert np.all(centroids.numpy() > before)
    converged = codebooks.take_lloyd_step(tf.reshape(kernel, [-1, 8]), tf.convert_to_tensor(centroids), 1.0)
    np.testing.assert_allclose(centroids, converged, rtol=1e-6)


def test_centroids_that_do_not_move(model):
    """At rate 0, centroids stay where they are while weights train."""
    clustered = cluster_quantize(model, 4, centroid_update_rate=0.0)
    wrappers = wrappers_by_layer(clustered)
    centroids = {name: wrapper.cluster_centroids["kernel"].numpy() for name, wrapper in wrappers.items()}
    latent_weights = wrappers["second"].original_clusterable_weights["kernel"].numpy()
    fit(clustered)
    for name, wrapper in wrappers.items():
        np.testing.assert_array_equal(wrapper.cluster_centroids["kernel"], centroids[name])
    assert np.any(wrappers["second"].original_clusterable_weights["kernel"].numpy() != latent_weights)


def test_freezing(model):
    clustered = cluster_quantize(model, 4, centroid_update_steps=1)
    fit(clustered, epochs=2, learning_rate=0.1, callbacks=[FreezeClusters(step=4)])
    kernels = read_clustered_kernels(clustered)
    ranges = [quantizer.range.numpy() for quantizer in quantizers(clustered)]
    biases = clustered.get_layer("cluster_second").layer.bias.numpy()
    fit(clustered, epochs=2, learning_rate=0.1)
    for kernel, expected in zip(read_clustered_kernels(clustered), kernels, strict=True):
        np.testing.assert_array_equal(kernel, expected)
    np.testing.assert_array_equal(ranges, [quantizer.range.numpy() for quantizer in quantizers(clustered)])
    assert np.any(biases != clustered.get_layer("cluster_second").layer.bias.numpy())
    for wrapper in wrappers_by_layer(clustered).values():
        wrapper.freeze(False)
    fit(clustered, learning_rate=0.1)
    assert any(np.any(new != old) for new, old in zip(read_clustered_kernels(clustered), kernels, strict=True))


def test_weights_keep_their_centroid_while_clusters_are_frozen():
    """Even if the optimizer moves it past its neighbours, and wherever momentum moves the latent weights."""
    wrapper = ClusterQuantize(keras.layers.Dense(8), 4, train_centroids=True)
    wrapper.build((None, 30))
    wrapper.freeze()
    _, before, indices = wrapper.clusters()["kernel"]
    centroids = wrapper.cluster_centroids["kernel"]
    centroids.assign(centroids.numpy()[:, [0, 2, 1, 3]])
    wrapper.original_clusterable_weights["kernel"].assign(np.zeros([30, 8]))
    _, after, indices_after = wrapper.clusters()["kernel"]
    np.testing.assert_array_equal(after, before.numpy()[:, [0, 2, 1, 3]])
    np.testing.assert_array_equal(indices_after, indices)
    outputs = wrapper(np.eye(30, dtype="float32"), training=True)
    np.testing.assert_allclose(outputs, codebooks.look_up(after, indices), rtol=1e-6)


def test_quantization_sets_in_gradually(tmp_path):
    """In training, weights move gradually to their centroids, with unscaled gradients; in evaluation they are there."""
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
        (kernel,) = wrappers_by_layer(clustered)["dense"].original_clusterable_weights.values()
        expected = np.broadcast_to(batch.sum(axis=0)[:, np.newaxis], kernel.shape)
        np.testing.assert_allclose(tape.gradient(total, kernel), expected, rtol=1e-5)
        np.testing.assert_array_equal(clustered(batch), quantized)
    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_allclose(loaded(batch, training=True), 0.75 * quantized + 0.25 * in_float, atol=1e-5)
    for _ in range(2):
        np.testing.assert_array_equal(loaded(batch, training=True), quantized)
    wrappers_by_layer(clustered)["dense"].freeze()
    np.testing.assert_array_equal(clustered(batch, training=True), quantized)


def test_saved_and_loaded_in_the_middle_of_training(model, tmp_path):
    """With trained centroids, which are weights too; other tests load models without."""
    clustered = fit(cluster_quantize(model, 4, cluster_per_channel=True, train_centroids=True))
    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    assert [w.shape for w in loaded.trainable_weights] == [w.shape for w in clustered.trainable_weights]
    fit(loaded, epochs=1), fit(clustered, epochs=1)
    np.testing.assert_allclose(loaded(random_images()), clustered(random_images()), rtol=1e-5, atol=1e-6)
    stripped = strip_cluster_quantize(loaded)
    stripped.save(tmp_path / "s.keras")
    assert tflite.convert(keras.models.load_model(tmp_path / "s.keras")) == tflite.convert(stripped)


def test_log(model, tmp_path):
    fit(cluster_quantize(model, 4), callbacks=[ClusterLog(tmp_path, every=2)])
    scalars = {}
    for path in tmp_path.iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    for name in ("inertia", "empty_clusters", "centroid_0", "centroid_3"):
        assert [step for step, _ in scalars[f"clusters/second_kernel/{name}"]] == [2, 4, 6, 8]
    assert [step for step, _ in scalars["clusters/second_kernel/moves_per_step"]] == [4, 6, 8]
    assert all(value > 0 for _, value in scalars["clusters/second_kernel/inertia"])
    (_, smallest), *_ = scalars["clusters/second_kernel/centroid_0"]
    (_, largest), *_ = scalars["clusters/second_kernel/centroid_3"]
    assert smallest < largest


def test_accuracy_survives_training(fused_digits, digits):
    """With 4 clusters, before training and after two epochs."""

    def evaluate_top1(model):
        model.compile(metrics=[keras.metrics.SparseCategoricalAccuracy("top1")])
        return model.evaluate(digits.evaluation("test"), verbose=0, return_dict=True)["top1"]

    clustered = cluster_quantize(
        fused_digits, 4, calibration=digits.calibration(64).as_numpy_iterator(), centroid_update_steps=5
    )
    before = evaluate_top1(clustered)
    steps = digits.steps_per_epoch(32)
    clustered.compile(keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clustered.fit(digits.training(32, range(2)), steps_per_epoch=steps, epochs=2, verbose=0)
    after = evaluate_top1(clustered)
    assert after > max(before, evaluate_top1(fused_digits) - 0.04)


def test_trained_centroids_that_lose_their_weights_or_their_order():
    def make_wrapper(rate):
        layer = keras.layers.Dense(8)
        wrapper = ClusterQuantize(layer, 4, centroid_update_rate=rate, centroid_update_steps=1, train_centroids=True)
        wrapper.build((None, 30))
        return wrapper

    wrapper = make_wrapper(rate=0)
    start = wrapper.cluster_centroids["kernel"].numpy()
    wrapper.cluster_centroids["kernel"].assign(start + np.float32([[0, 0, 0, 50]]))
    wrapper(np.zeros([1, 30], "float32"), training=True)
    centroids = wrapper.cluster_centroids["kernel"].numpy()
    np.testing.assert_array_equal(centroids[0, :3], np.sort(centroids)[0, :3])
    assert np.max(centroids) < 1
    wrapper = make_wrapper(rate=1)
    start = wrapper.cluster_centroids["kernel"].numpy()
    wrapper.cluster_centroids["kernel"].assign(start[:, [1, 0, 2, 3]])
    latent, *_ = wrapper.clusters()["kernel"]
    wrapper(np.zeros([1, 30], "float32"), training=True)
    np.testing.assert_array_equal(wrapper.cluster_centroids["kernel"], codebooks.take_lloyd_step(latent, start, 1.0))


def test_weights_that_are_no_longer_finite_are_refused(model):
    """Codes would hide them: NaN gets the first centroid."""
    clustered = cluster_quantize(model, 4, centroid_update_rate=0.0, calibration=random_images())
    wrapper = wrappers_by_layer(clustered)["second"]
    wrapper.original_clusterable_weights["kernel"].assign(np.full(wrapper.layer.kernel.shape, np.nan))
    with pytest.raises(ValueError, match="'second' holds infinities or NaN"):
        strip_cluster_quantize(clustered)
    dense = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    dense.get_layer("dense").set_weights([np.ones([3, 2]), np.full(2, np.nan)])
    with pytest.raises(ValueError, match="'dense' holds infinities or NaN"):
        cluster_quantize(dense, 4)


def test_calibration_averages_over_batches_and_changes_ranges_only():
    inputs = keras.Input((6, 6, 1))
    features = keras.layers.Dropout(0.5)(keras.layers.Conv2D(2, 3, name="first")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="second")(keras.layers.Flatten()(features)))
    batches = [np.full([64, 6, 6, 1], value, "float32") for value in (1, 2, 6)]
    clustered = cluster_quantize(model, 4, calibration=np.concatenate(batches))
    input_quantizer, *others = quantizers(clustered)
    np.testing.assert_allclose(input_quantizer.range, [0, 3], rtol=1e-6)
    _, *same_others = quantizers(cluster_quantize(model, 4, calibration=np.concatenate(batches)))
    for quantizer, same_quantizer in zip(others, same_others, strict=True):  # dropout is inactive
        np.testing.assert_array_equal(quantizer.range, same_quantizer.range)
    assert all(wrapper._codebooks["kernel"]._steps.numpy() == 0 for wrapper in wrappers_by_layer(clustered).values())
    input_quantizer.range.assign([0, 1])
    clustered(batches[0])  # calibration is over
    np.testing.assert_array_equal(input_quantizer.range, [0, 1])


def test_whole_numbers_of_numpy(model, tmp_path):
    clustered = cluster_quantize(model, np.int64(5), centroid_update_steps=np.int32(2))
    clustered.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("cluster_first").number_of_clusters == 5
    with pytest.raises(ValueError, match=r"number_of_clusters is 4\.5; it must be a whole number from 2 to 256"):
        ClusterQuantize(keras.layers.Dense(2), 4.5)


def test_bad_input(model):
    def assert_refuses(match, model=model, clusters=8, **arguments):
        with pytest.raises(ValueError, match=match):
            cluster_quantize(model, clusters, **arguments)

    for bad in (1, 257, "x", 4.5):
        assert_refuses("numbers of clusters are .* must be a whole number from 2 to 256", clusters=bad)
    assert_refuses("'secnd' of numbers of clusters matches no layer; there are: second", clusters="secnd=4,.*=8")
    assert_refuses("no pattern of numbers of clusters matches layer 'second'", clusters="first=4")
    assert_refuses("pattern 'first' of numbers of clusters comes too late", clusters=".*=8,first=4")
    assert_refuses("cluster_gradient_aggregation is 'sum'; known: .*SUM", cluster_gradient_aggregation="sum")
    assert_refuses("cluster_gradient_aggregation is None; known: .*SUM", cluster_gradient_aggregation=None)
    assert_refuses("activation bits are 0; known: 8, 16", activation_bits=0)
    assert_refuses("cluster_centroids_init is 'linear'; known: .*LINEAR", cluster_centroids_init="linear")
    assert_refuses("centroid_update_rate is 1.5; it must be from 0 to 1", centroid_update_rate=1.5)
    assert_refuses("centroid_update_steps is 0; it must be a whole number above 0", centroid_update_steps=0)
    assert_refuses("ramp_steps is -1; it must be a whole number, 0 for none", ramp_steps=-1)
    assert_refuses("there are no calibration images", calibration=[])
    assert_refuses("but got Sequential", keras.Sequential([keras.layers.Dense(3)]))
    training_form = build_repvgg("digits", (8, 8, 1), 10)
    assert_refuses("is still in training form", training_form)
    assert_refuses("batch_norm_statistics is 'x'; known: frozen, running", training_form, batch_norm_statistics="x")
    with_se = model_in_training_form(RepVGGBlock, se_reduction=2)
    assert_refuses("'first' has a squeeze-and-excite, .*fuse", with_se, batch_norm_statistics="frozen")
    inputs = keras.Input(SIZE)
    with_norm = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(inputs))
    assert_refuses("has no Conv2D, .* layer of its own", with_norm, batch_norm_statistics="frozen")
    local = keras.Sequential([keras.Input(SIZE), keras.layers.LocallyConnected2D(2, 3, name="local")])
    assert_refuses(
        "'local' is a LocallyConnected2D, whose weights cannot be trained with quantization; .* ClusterableLayer can",
        local,
    )
    broken = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="broken")])
    broken.get_layer("broken").set_weights([np.full([3, 2], np.nan), np.zeros(2)])
    assert_refuses("'broken' holds infinities or NaN", broken)
    with pytest.raises(
        ValueError, match=r"'cluster_first' is still in training; call .*strip_cluster_quantize\(model\)"
    ):
        tflite.convert(cluster_quantize(model, 4, calibration=random_images()))
    with pytest.raises(ValueError, match="holds nothing that strip_cluster_quantize strips; was it made for training"):
        strip_cluster_quantize(model)
    with pytest.raises(ValueError, match="holds nothing that strip_cluster_quantize strips"):
        fit(keras.models.clone_model(model), callbacks=[ClusterLog("unused")])
