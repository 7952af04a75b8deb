"""Activation ranges that no single image can spoil, and the order in which methods decide on ranges."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg
from helpers.ptq import network_of

from tf_repvgg import tflite
from tf_repvgg.quantization import ptq, quantizers
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer, round_to_codes
from tf_repvgg.quantization.ptq import METHODS, calibration
from tf_repvgg.quantization.ptq.methods.relative import search_relative_range
from tf_repvgg.quantization.ptq.observers import collect_image_histograms


def _network_of_values(values, bits=8):
    """A network whose only ranges are those of given values [images, ...]."""
    inputs = keras.Input(values.shape[1:], name="image")
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1, name="conv")(inputs))
    return network_of(model, 8, batch=values.astype(np.float32), activation_bits=bits)


def _compute_exact_error(values, ends, bits):
    """The mean over images of the error that `relative` minimizes, from the values themselves."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    energies = np.mean(np.square(flat), axis=1)
    errors = np.mean(np.square(round_to_codes(flat, *ends, bits)[0] - flat), axis=1)
    return float(np.mean(errors / (energies + np.median(energies))))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sign", [0, 1])
def test_ranges_serve_all_images_and_not_the_extreme_one(bits, sign):
    values = np.random.default_rng(0).normal(size=[200, 4, 4, 5]) - 0.5 * sign
    values = values if sign else np.maximum(values, 0)
    values[7] *= 400
    network = _network_of_values(values, bits)
    histograms = collect_image_histograms(network)["image_quantizer"]
    assert (histograms.low, histograms.high) == (pytest.approx(values.min()), pytest.approx(values.max()))
    low, high = search_relative_range(histograms, bits)
    if bits == 8:
        assert 2 < high - low < 60  # the largest value is over 800
    best = min(
        _compute_exact_error(values, (values.min() * low_share, values.max() * high_share), bits)
        for low_share in 2.0 ** (-np.arange(0, 49, 2) / 4)
        for high_share in 2.0 ** (-np.arange(0, 49, 2) / 4)
    )
    assert _compute_exact_error(values, (low, high), bits) < 1.1 * best


def test_rounding_is_that_of_the_quantizer():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for bits in (8, 16):
        quantizer = ActivationQuantizer(bits=bits)
        quantizer.build((None,))
        quantizer.set_range(-1.3, 0.7)
        rounded, scale = round_to_codes(values, -1.3, 0.7, bits)
        assert scale == pytest.approx(quantizer.scale(), rel=1e-5)
        assert np.mean(np.abs(rounded - quantizer(values).numpy()) > 1e-5) < 0.01  # ties


def test_histograms_of_batches_are_those_of_all_images(monkeypatch):
    values = random_images(21, (9, 9, 3)) * np.geomspace(1e-3, 1e3, 21)[:, None, None, None]
    network = _network_of_values(values)
    whole = collect_image_histograms(network)["image_quantizer"]
    monkeypatch.setattr(calibration, "_BATCH", 4)
    for expected, actual in zip(whole, collect_image_histograms(network)["image_quantizer"], strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert whole.counts.sum(axis=1).tolist() == [values[0].size] * 21


def test_images_without_values_and_infinite_values():
    zeros = _network_of_values(np.zeros([3, 4, 4, 1]))
    METHODS["relative"].function(zeros)
    assert zeros.is_complete
    values = np.ones([3, 4, 4, 1])
    values[1, 0, 0, 0] = 3e38
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="is not a range"):
        METHODS["relative"].function(_network_of_values(values * np.float32(10)))


@pytest.fixture(scope="module")
def model_and_images():
    model = small_repvgg()
    batch = random_images(16, model.input_shape[1:])
    batch[3] *= 30
    return model, batch


def _measure_ranges(model, batch, chain):
    quantized = ptq.quantize(model, chain, 8, True, batch, iterations=2)
    return {quantizer.name: quantizer.range.numpy().tolist() for quantizer in quantizers(quantized)}


@pytest.fixture(scope="module")
def relative_ranges(model_and_images):
    return _measure_ranges(*model_and_images, "relative")


@pytest.mark.parametrize("method", ["adaround", "codebook", "octav", "dfq"])
def test_methods_keep_the_ranges_of_one_before(model_and_images, relative_ranges, method):
    ranges = _measure_ranges(*model_and_images, f"relative+{method}")
    largest = float(model_and_images[1].max())
    assert ranges["image_quantizer"] == relative_ranges["image_quantizer"] != [0.0, pytest.approx(largest)]
    if method != "dfq":  # which changes the float network, and so the ranges of its activations
        assert ranges == relative_ranges


def test_equalization_after_ranges_is_refused():
    model = small_repvgg()
    with pytest.raises(ValueError, match=r"'relative\+equalize'.*'equalize\+relative'"):
        ptq.quantize(model, "relative+equalize", calibration=random_images(4, model.input_shape[1:]))


def test_a_file_of_relative_ranges_agrees_with_its_model():
    model = small_repvgg()
    batch = random_images(16, model.input_shape[1:])
    quantized = ptq.quantize(model, "equalize+relative+bias_correct", 8, False, batch)
    outputs = tflite.predict(tflite.convert(quantized), batch)
    assert np.max(np.abs(outputs - model(batch).numpy())) < 0.1 * np.max(np.abs(outputs))
