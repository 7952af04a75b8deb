"""tfmot as a baseline: its models train as they are, and end in exact files."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import fit, model_of_all_weighted_layers, output_step, random_images, small_repvgg
from tensorflow_model_optimization.python.core.clustering.keras.cluster import strip_clustering

from tf_repvgg import tflite
from tf_repvgg.quantization.qat.clustering import GradientAggregation
from tf_repvgg.quantization.qat.tfmot_baseline import strip_tfmot_quantize, tfmot_cluster, tfmot_quantize


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


@pytest.mark.parametrize("per_channel", [False, True])
def test_clustering_then_quantization(model, per_channel):
    """The stripped model equals tfmot's bit for bit, and every channel in the file has the requested clusters."""
    before = [weight.numpy() for weight in model.weights]
    clustered = strip_clustering(fit(tfmot_cluster(model, "logits=16,.*=4", cluster_per_channel=per_channel)))
    trained = fit(tfmot_quantize(clustered))
    stripped = strip_tfmot_quantize(trained, clustered)
    np.testing.assert_array_equal(stripped(random_images()), trained(random_images()))
    file = tflite.convert(stripped)
    for name, kernel in zip(("first", "second"), tflite.weight_codes(file), strict=False):
        columns = kernel.codes.reshape(-1, kernel.codes.shape[-1]).T
        assert max(len(np.unique(column)) for column in columns) <= 4, name
    batch = random_images(8, seed=1)
    # tfmot's ranges start at 6 and follow slowly, so the outputs span few steps of their grid.
    assert np.max(np.abs(tflite.predict(file, batch) - stripped(batch))) <= 2.01 * output_step(stripped)
    for weight, values in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, values)


def test_the_gradient_of_a_centroid(model):
    """Summed over its weights, the gradient moves a centroid much farther in the first step than averaged."""
    moved = {}
    for aggregation in GradientAggregation:
        clustered = tfmot_cluster(model, 4, cluster_gradient_aggregation=aggregation)
        (layer,) = (layer for layer in clustered.layers if "second" in layer.name)
        centroids = layer.cluster_centroids["kernel"]
        before = centroids.numpy()
        clustered.compile(keras.optimizers.SGD(1e-6), "mse")
        clustered.train_on_batch(random_images(8), np.zeros([8, *clustered.output_shape[1:]]))
        moved[aggregation] = np.max(np.abs(centroids.numpy() - before))
    assert moved[GradientAggregation.SUM] > 10 * moved[GradientAggregation.AVG] > 0


def test_bad_input(model):
    with pytest.raises(ValueError, match="numbers of clusters are 1"):
        tfmot_cluster(model, 1)
    with pytest.raises(ValueError, match="holds no layers of tfmot's quantization-aware training"):
        strip_tfmot_quantize(model, model)


def test_depthwise_kernels_are_left_alone():
    _, *layers = (type(layer).__name__ for layer in tfmot_cluster(model_of_all_weighted_layers(), 4).layers)
    assert layers == ["ClusterWeights", "DepthwiseConv2D", "Flatten", "ClusterWeights"]
