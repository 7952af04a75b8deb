"""Each method of post-training quantization does what its paper says, and does not end worse than it started."""

import sys

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg
from helpers.ptq import network_of, smooth_images
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg import tflite
from tf_repvgg.quantization import ptq, quantize_min_max
from tf_repvgg.quantization.ptq import METHODS
from tf_repvgg.quantization.ptq.absorption import absorb_high_biases
from tf_repvgg.quantization.ptq.methods.mse import search_grid, search_range
from tf_repvgg.quantization.ptq.methods.octav import find_optimal_clip
from tf_repvgg.quantization.ptq.methods.percentile import find_central_range
from tf_repvgg.quantization.ptq.observers import Histogram
from tf_repvgg.quantization.ptq.reconstruction import compute_layer_error


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


@pytest.mark.parametrize("size", [0, 1e-30])
def test_channels_that_training_has_emptied_are_not_equalized(size):
    """Their biases would grow without bound, and no scale of the weights would serve both."""
    model = small_repvgg()
    emptied = model.get_layer("second")
    kernel, bias = emptied.get_weights()
    kernel[..., :2] *= size
    bias[:2] = 0.5
    emptied.set_weights([kernel, bias])
    batch = random_images(32, model.input_shape[1:])
    quantized = ptq.quantize(model, "equalize", calibration=batch)
    assert quantized.get_layer("second").bias.numpy()[:2] == pytest.approx(0.5, rel=0.01)
    expected = model(batch).numpy()
    for predicted in (quantized(batch).numpy(), tflite.predict(tflite.convert(quantized), batch)):
        assert np.max(np.abs(predicted - expected)) < 0.05 * np.max(np.abs(expected))


def test_bias_correction_restores_means(model):
    network = network_of(model, 3)
    METHODS["min_max"].function(network)
    before = network.compute_error()
    METHODS["bias_correct"].function(network)
    assert network.compute_error() < before
    for name in network.layers:
        expected = network.compute_linear_outputs(name)
        actual = network.compute_quantized_linear_outputs(name) + network.get_quantized_bias(name)
        axes = tuple(range(expected.ndim - 1))
        np.testing.assert_allclose(actual.mean(axes), expected.mean(axes), atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("layer", ["fused", "ReLU", "Activation"])
def test_mean_correction_restores_means_behind_activations(layer):
    """Where clipping makes kernels smaller, restoring the means before the activations does not."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((12, 11, 3))
    for number in range(6):
        activation = "relu" if layer == "fused" else None
        x = keras.layers.Conv2D(16, 3, padding="same", activation=activation, name=f"conv{number}")(x)
        if layer != "fused":
            x = keras.layers.ReLU()(x) if layer == "ReLU" else keras.layers.Activation("relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="logits")(keras.layers.GlobalAveragePooling2D()(x)))
    random = np.random.default_rng(0)
    for conv in (layer for layer in model.layers if layer.name.startswith("conv")):
        kernel, bias = (random.normal(size=weight.shape) for weight in conv.weights)  # with tails that mse clips
        conv.set_weights([kernel**3 / np.sqrt(kernel[..., 0].size), 0.1 * bias])
    batch = smooth_images(64)
    errors = {}
    for method in ("mse", "mse+bias_correct", "mse+mean_correct"):
        network = ptq.quantize_network(model, method, 3, calibration=batch)
        errors[method] = network.compute_error()
    assert errors["mse+mean_correct"] < 0.9 * min(errors["mse"], errors["mse+bias_correct"])
    for name in [f"conv{number}" for number in range(6)]:
        linear = network.compute_quantized_linear_outputs(name) + network.get_quantized_bias(name)
        actual, expected = np.maximum(linear, 0), np.maximum(network.compute_linear_outputs(name), 0)
        difference = np.abs(actual.mean((0, 1, 2)) - expected.mean((0, 1, 2)))
        assert np.mean(difference < 0.02 * expected.max()) > 0.8  # a few channels need more than two deviations


def test_mean_correction_without_improvement_is_undone(model, monkeypatch):
    module = sys.modules["tf_repvgg.quantization.ptq.methods.mean_correct"]

    def spoil(network):
        network.set_bias("logits", np.full(5, 100.0))
        return network.compute_error()

    monkeypatch.setattr(module, "_correct_means", spoil)
    network = network_of(model, 4)
    METHODS["mse"].function(network)
    before = network.compute_error()
    METHODS["mean_correct"].function(network)
    assert network.compute_error() == pytest.approx(before, rel=1e-4)
    assert network.notes == ["mean correction was undone: it did not reduce the error of the outputs"]


def test_absorption_keeps_the_function_above_its_threshold():
    inputs = keras.Input((6, 6, 3), name="image")
    twenty = keras.initializers.Constant(20.0)
    features = keras.layers.Conv2D(4, 3, activation="relu", name="high", bias_initializer=twenty)(inputs)
    outputs = keras.layers.Conv2D(2, 3, name="next")(features)
    model = keras.Model(inputs, outputs)
    network = network_of(model)
    absorb_high_biases(network)
    difference = np.abs(network.float(network.calibration.inputs) - model(network.calibration.inputs).numpy())
    assert np.max(difference) < 0.1 and np.mean(difference < 1e-4) > 0.9  # one in a thousand inputs is below it
    assert np.all(network.bias("high") < 15)


def test_dfq_reports_absorption(model):
    notes = ptq.quantize(model, "dfq", 4, calibration=random_images(32)).quantization_notes
    assert any("high-bias absorption changed the float outputs by" in note for note in notes)


@pytest.mark.parametrize("bits, per_channel", [(2, True), (3, False), (8, False)])
@pytest.mark.parametrize("method", ["adaround", "adaquant", "codebook_adaquant"])
def test_no_layer_ends_worse_than_its_start(model, method, bits, per_channel, monkeypatch):
    """By its error on the images held out, after the final prefix; and the network as a whole ends better."""
    batch = smooth_images()
    start, network = (network_of(model, bits, per_channel, batch, iterations=40) for _ in range(2))
    METHODS["codebook" if method == "codebook_adaquant" else "mse"].function(start)
    module = sys.modules[f"tf_repvgg.quantization.ptq.methods.{method}"]
    monkeypatch.setattr(module, "bias_tune", lambda network: None)  # it moves the biases of the prefix once more
    METHODS[method].function(network)
    assert bits == 8 or network.compute_error() < start.compute_error()
    _, held_out = network.calibration.split(seed=0)
    errors = []
    for name in network.layers:
        layer = network.quantized.get_layer(name)
        inputs, expected = network.compute_quantized_inputs(name), network.compute_layer_outputs(name)
        inputs, expected = inputs[held_out], expected[held_out]
        errors.append(
            [
                compute_layer_error(layer, form.kernels[name], form.get_quantized_bias(name), inputs, expected)
                for form in (network, start)
            ]
        )
    assert all(ended <= started for ended, started in errors)
    assert bits == 8 or errors[0][0] < errors[0][1]  # in 8 bits a few steps may find nothing better
    monkeypatch.undo()
    biases = network.get_quantized_biases()
    METHODS["bias_tune"].function(network)
    is_changed = any(np.any(network.get_quantized_bias(name) != bias) for name, bias in biases.items())
    assert is_changed or network.notes[-1].startswith("bias tuning was undone")
    if method == "adaround" and bits == 3:
        for name, quantized in network.kernels.items():
            exact = np.clip(network.kernel(name) / quantized.scale, -3, 3)
            assert np.all(np.abs(quantized.codes - exact) <= 1)


def test_a_start_that_cannot_be_improved_is_kept(model, monkeypatch):
    """A learning rate that ruins everything."""
    for method in ("adaquant", "bias_tune"):
        monkeypatch.setattr(sys.modules[f"tf_repvgg.quantization.ptq.methods.{method}"], "_LEARNING_RATE", 1e3)
    start, network = network_of(model, 8), network_of(model, 8, iterations=5)
    METHODS["mse"].function(start)
    METHODS["adaquant"].function(network)
    for name, quantized in start.kernels.items():
        np.testing.assert_array_equal(network.kernels[name].codes, quantized.codes)
        np.testing.assert_array_equal(network.get_quantized_bias(name), start.get_quantized_bias(name))
    assert network.notes == ["bias tuning was undone: it did not reduce the error of the outputs"]


def test_bias_tuning_moves_biases_alone(model):
    start, network = network_of(model, 3), network_of(model, 3, iterations=100)
    METHODS["mse"].function(start)
    METHODS["bias_tune"].function(network)
    assert network.compute_error() < 0.9 * start.compute_error() and network.notes == []
    for name, quantized in start.kernels.items():
        np.testing.assert_array_equal(network.kernels[name].codes, quantized.codes)
        assert np.any(network.get_quantized_bias(name) != start.get_quantized_bias(name))
    tflite.convert(network.quantized)


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), per_channel=st.booleans())
def test_mse_grid_is_never_worse_than_min_max(seed, bits, per_channel):
    kernel = np.random.default_rng(seed).standard_t(3, (3, 3, 4, 5)).astype("float32")
    results = [method(kernel, bits, per_channel) for method in (search_grid, quantize_min_max)]
    errors = [np.sum(np.square(result.dequantize() - kernel)) for result in results]
    assert errors[0] <= errors[1]
    assert bits > 4 or errors[0] < errors[1]


def test_mse_range_clips_an_outlier_that_min_max_keeps():
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 40.0)
    counts, edges = np.histogram(values, 2048)
    low, high = search_range(Histogram(counts, edges))
    assert high < 30 and low < -3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_octav_clips_where_its_objective_is_smallest(bits, per_channel):
    kernel = np.random.default_rng(0).standard_t(3, (3, 3, 16, 4)).astype(np.float32) * (1, 10, 0.1, 0)
    clips = find_optimal_clip(kernel, bits, per_channel)
    assert clips.shape == ((4,) if per_channel else (1,))
    for clip, weights in zip(clips, np.abs(kernel.reshape(-1, 4)).T if per_channel else [np.abs(kernel)], strict=True):

        def objective(clip, weights=weights[weights > 0]):
            return np.sum(np.where(weights > clip, np.square(weights - clip), 4.0**-bits / 3 * clip**2))

        # Newton's iteration overlooks that the number of weights beyond a clip jumps.
        assert objective(clip) <= 1.02 * min(map(objective, np.linspace(0, np.max(weights), 1001)))


def test_percentile_range_by_hand():
    histogram = Histogram(np.array([1, 0, 48, 50, 1]), np.arange(6.0))
    assert find_central_range(histogram, 0.98) == (2.0, 4.0)
    assert find_central_range(histogram, 1.0) == (0.0, 5.0)
