"""ClusterQAT of all kinds of models and layers: in training form, shared, frozen, the user's own, without images."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from helpers.clustering import count_clusters, model_in_training_form, read_clustered_kernels, wrappers_by_layer
from helpers.networks import (
    SIZE,
    assert_file_computes_the_model,
    fit,
    model_of_all_weighted_layers,
    random_images,
    small_repvgg,
)

from tf_repvgg import graph, tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.quantization import (
    cluster_quantize,
    learned_step_quantize,
    quantizers,
    strip_cluster_quantize,
)
from tf_repvgg.quantization.qat.clustering import CentroidInitialization


@pytest.mark.parametrize("per_channel", [False, True])
def test_any_functional_model(per_channel):
    model = model_of_all_weighted_layers()
    clustered = cluster_quantize(
        model, "dense=16,.*=3", cluster_per_channel=per_channel, calibration=random_images(8, (8, 8, 3))
    )
    stripped = strip_cluster_quantize(clustered)
    batch = random_images(4, (8, 8, 3), seed=1)
    np.testing.assert_array_equal(stripped(batch), clustered(batch))
    conv, depthwise, dense = tflite.weight_codes(tflite.convert(stripped))
    assert count_clusters(conv.codes, per_channel) == count_clusters(depthwise.codes, per_channel) == 3
    assert 3 < count_clusters(dense.codes, per_channel) <= 16


LOAD = """
import sys, tf_repvgg, tf_keras
assert "tensorflow_model_optimization" not in sys.modules
for path in sys.argv[1:]:
    print(type(tf_keras.models.load_model(path, compile=False).layers[2]).__name__)
"""


def test_models_in_training_load_in_another_process(run_program, tmp_path):
    """With `import tf_repvgg` alone."""
    models = {
        "ClusterQuantize": cluster_quantize(small_repvgg(), 4),
        "ClusterQuantizeBlock": cluster_quantize(
            model_in_training_form(RepVGGBlock), 4, batch_norm_statistics="frozen"
        ),
        "LearnedStep": learned_step_quantize(small_repvgg(), 4),
    }
    paths = [tmp_path / f"{number}.{ending}" for number, ending in enumerate(("keras", "keras", "h5"))]
    for path, model in zip(paths, models.values(), strict=True):
        model.save(path)
    result = run_program("-c", LOAD, *paths)
    assert result.stdout.split() == list(models), result.stderr[-2000:]


def test_tfmot_strips_it_too():
    clustered = fit(cluster_quantize(small_repvgg(), 4))
    stripped = tfmot.clustering.keras.strip_clustering(clustered)
    np.testing.assert_array_equal(stripped(random_images()), clustered(random_images()))
    assert type(stripped.get_layer("second")) is keras.layers.Conv2D
    assert count_clusters(stripped.get_layer("second").kernel.numpy(), False) == 4


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.Layer, tfmot.clustering.keras.ClusterableLayer):
    """A layer of the user's own."""

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


def test_layers_of_the_users_own():
    inputs = keras.Input((40,))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(Scaled(name="custom")(inputs)))
    with pytest.raises(ValueError, match=r"layer 'custom' \(Scaled\) has no integer form in TFLite"):
        cluster_quantize(model, "custom=2,.*=16")  # as it multiplies and adds without a quantizer between
    clustered = cluster_quantize(model, "custom=2,.*=16", activation_bits=None)
    batch = random_images(16, (40,))
    clustered.compile("sgd", "mse")
    clustered.fit(batch, np.ones([16, 5]), verbose=0)
    for stripped in (strip_cluster_quantize(clustered), tfmot.clustering.keras.strip_clustering(clustered)):
        np.testing.assert_allclose(stripped(batch), clustered(batch), rtol=1e-6)
        assert type(stripped.get_layer("custom")) is Scaled
        assert len(np.unique(stripped.get_layer("custom").factor)) == 2
    model.get_layer("custom").algorithm = object
    with pytest.raises(ValueError, match="'custom' brings its own clustering algorithm"):
        cluster_quantize(model, 4)


@keras.saving.register_keras_serializable(package="tests")
class ConvolutionOfTheUser(keras.layers.Conv2D, tfmot.clustering.keras.ClusterableLayer):
    """A subclass of Conv2D, which may do more with its kernel."""

    def get_clusterable_weights(self):
        return [("kernel", self.kernel)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_codes_of_a_subclass_are_those_of_the_file(per_channel):
    inputs = keras.Input(SIZE)
    features = ConvolutionOfTheUser(8, 3, activation="relu", name="custom")(inputs)
    features = keras.layers.Dense(5, name="dense")(keras.layers.GlobalAveragePooling2D()(features))
    clustered = cluster_quantize(keras.Model(inputs, features), 6, cluster_per_channel=per_channel)
    stripped = strip_cluster_quantize(fit(clustered))
    kernel = stripped.get_layer("custom").kernel.numpy()
    in_file = next(part for part in tflite.weight_codes(tflite.convert(stripped)) if part.codes.shape == kernel.shape)
    np.testing.assert_allclose(in_file.dequantize(), kernel, atol=1e-6)
    assert count_clusters(in_file.codes, per_channel) == count_clusters(kernel, per_channel) == 6


def test_layers_that_do_not_train(tmp_path):
    """They are clustered too, do not change, and are saved, loaded and stripped."""
    fused = small_repvgg()
    fused.get_layer("first").trainable = False
    clustered = cluster_quantize(fused, 4, calibration=random_images())
    before = wrappers_by_layer(clustered)["first"].clusters()["kernel"][0].numpy()
    fit(clustered)
    np.testing.assert_array_equal(wrappers_by_layer(clustered)["first"].clusters()["kernel"][0], before)
    assert all(count_clusters(kernel, False) == 4 for kernel in read_clustered_kernels(clustered))
    clustered.trainable = False
    clustered.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    stripped = strip_cluster_quantize(loaded)
    np.testing.assert_allclose(stripped(random_images()), clustered(random_images()), atol=1e-6)


@pytest.mark.parametrize(
    "block, options, statistics",
    [
        (RepVGGBlock, {"norm": "oabn"}, "running"),
        (RepVGGBlock, {"padding": "symmetric"}, "frozen"),
        (QARepVGGBlock, {}, "running"),
        (QARepVGGBlock, {}, "frozen"),
    ],
)
def test_in_training_form(block, options, statistics, tmp_path):
    """The branches train, their merged kernel is quantized, and the stripped model has plain layers."""
    model = model_in_training_form(block, **options)
    clustered = cluster_quantize(model, 8, batch_norm_statistics=statistics, calibration=random_images())
    wrapper = clustered.get_layer("cluster_second")
    kernel, _ = model.get_layer("second").equivalent_kernel_and_bias()
    np.testing.assert_array_equal(wrapper.clusters()["kernel"][0], tf.reshape(kernel, [-1, 6]))
    norm = wrapper.layer.norm3x3
    before = [norm.moving_mean.numpy(), norm.gamma.numpy(), wrapper.layer.conv1x1.kernel.numpy()]
    fit(clustered, learning_rate=0.01)
    after = [norm.moving_mean.numpy(), norm.gamma.numpy(), wrapper.layer.conv1x1.kernel.numpy()]
    has_changed = [bool(np.any(old != new)) for old, new in zip(before, after, strict=True)]
    assert has_changed == [statistics == "running", True, True]

    clustered.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded(random_images()), clustered(random_images()))
    loaded(random_images(), training=True)
    stripped = strip_cluster_quantize(loaded)
    np.testing.assert_allclose(stripped(random_images()), loaded(random_images()), rtol=1e-5, atol=1e-6)
    assert not any(hasattr(layer, "equivalent_kernel_and_bias") for layer in graph.find_layers(stripped))
    file = tflite.convert(stripped)
    for name, kernel in zip(("first", "second", "logits"), tflite.weight_codes(file), strict=True):
        assert count_clusters(kernel.codes, False) <= 8
        np.testing.assert_array_equal(kernel.codes, stripped.get_layer(name).get_quantized_kernel().codes)
    assert_file_computes_the_model(stripped, file, random_images(8, seed=1))


def test_training_form_computes_as_the_deploy_form():
    """With so many clusters that only rounding errors remain."""
    model = model_in_training_form(RepVGGBlock)
    clustered = cluster_quantize(model, 256, batch_norm_statistics="frozen", activation_bits=None)
    np.testing.assert_allclose(clustered(random_images()), model(random_images()), atol=0.02)


def test_quantization_sets_in_gradually_in_training_form():
    model = model_in_training_form(RepVGGBlock)
    clustered = cluster_quantize(
        model, 3, ramp_steps=3, batch_norm_statistics="frozen", centroid_update_rate=0.0, activation_bits=None
    )
    quantized = clustered(random_images())
    distances = [np.max(np.abs(clustered(random_images(), training=True) - quantized)) for _ in range(3)]
    assert distances[0] > distances[1] > distances[2] == 0


# Every kernel with every initialization, and each of both with both granularities.
FEW_VALUES = [
    (kernel, initialization, (row + column) % 2 == 1)
    for row, kernel in enumerate(("zero", "constant", "two values", "one dead channel"))
    for column, initialization in enumerate((None, *CentroidInitialization))
]


@pytest.mark.parametrize("kernel, initialization, per_channel", FEW_VALUES)
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
    quantized = stripped.get_layer("conv").get_quantized_kernel()
    if kernel != "one dead channel":
        np.testing.assert_allclose(quantized.dequantize(), values, atol=0.01 if initialization else 1e-6)
    assert count_clusters(quantized.codes, per_channel) <= 8
    np.testing.assert_allclose(stripped(batch), clustered(batch), atol=1e-6)
    tflite.convert(stripped)


def test_float_activations():
    clustered = cluster_quantize(small_repvgg(), 8, activation_bits=None)
    assert not quantizers(clustered)
    stripped = strip_cluster_quantize(clustered)
    file = tflite.convert(stripped, random_images())
    for kernel in tflite.weight_codes(file):
        assert count_clusters(kernel.codes, False) <= 8


def test_a_plain_model_with_normalizations():
    """Normalizations are merged: by `fuse`, or else before training."""
    size = (8, 8, 1)
    inputs = keras.Input(size)
    features = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    features = keras.layers.ReLU()(keras.layers.BatchNormalization(name="norm")(features))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(keras.layers.GlobalAveragePooling2D()(features)))
    model(random_images(16, size), training=True)
    calibration = random_images(64, size)
    clustered = cluster_quantize(fuse(model), 4, calibration=calibration)
    np.testing.assert_allclose(clustered(calibration), cluster_quantize(model, 4, calibration=calibration)(calibration))
    stripped = strip_cluster_quantize(clustered)
    file = tflite.convert(stripped)
    assert_file_computes_the_model(stripped, file, random_images(16, size, seed=1))
    assert all(count_clusters(kernel.codes, False) == 4 for kernel in tflite.weight_codes(file))


def test_a_model_of_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        clustered = cluster_quantize(small_repvgg(), 4, calibration=random_images())
        assert clustered(random_images()).dtype == tf.float32
        file = tflite.convert(strip_cluster_quantize(fit(clustered)))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert max(count_clusters(kernel.codes, False) for kernel in tflite.weight_codes(file)) <= 4


def test_models_without_images():
    dense = keras.Sequential([keras.Input((40,)), keras.layers.Dense(5, name="dense")])
    clustered = cluster_quantize(dense, 4, calibration=random_images(16, (40,)))
    assert np.all(np.isfinite(clustered(random_images(16, (40,)))))
    left, right = keras.Input((4,)), keras.Input((4,))
    two = keras.Model([left, right], keras.layers.Dense(2, name="dense")(keras.layers.Add()([left, right])))
    batches = [random_images(4, (4,), seed) for seed in range(2)]
    clustered = cluster_quantize(two, 4, calibration=batches)
    assert np.all(np.isfinite(clustered(batches)))
    clustered = cluster_quantize(two, 4)
    clustered(batches, training=True)
    stripped = strip_cluster_quantize(clustered)
    np.testing.assert_allclose(stripped(batches), clustered(batches), atol=1e-6)


def test_a_shared_layer():
    """Both places have the same codebook, and the file has one tensor for them."""
    inputs = keras.Input(SIZE)
    shared = keras.layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    pooled = keras.layers.GlobalAveragePooling2D()(shared(shared(inputs)))
    clustered = cluster_quantize(keras.Model(inputs, keras.layers.Dense(5, name="dense")(pooled)), 4)
    stripped = strip_cluster_quantize(fit(clustered))
    np.testing.assert_allclose(stripped(random_images()), clustered(random_images()), atol=1e-6)
    file = tflite.convert(stripped)
    assert_file_computes_the_model(stripped, file, random_images(seed=1))
    assert all(count_clusters(kernel.codes, False) == 4 for kernel in tflite.weight_codes(file))
