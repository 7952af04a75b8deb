"""Post-training quantization without images, from the statistics that fusion stores."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import SIZE, random_images, small_repvgg
from helpers.ptq import build_measured_repvgg, network_of

from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.ptq import METHODS
from tf_repvgg.quantization.ptq.statistics import clip_normal, predict


def test_clip_normal():
    sample = np.random.default_rng(0).normal(0.3, 2.0, 1_000_000)
    for ends in ((0, np.inf), (0, 6), (-np.inf, np.inf), (-1, 1), (20, 30)):
        clipped = np.clip(sample, *ends)
        np.testing.assert_allclose(clip_normal(0.3, 2.0, *ends), (clipped.mean(), clipped.std()), atol=0.01)
    mean, deviation = clip_normal(np.array([-1.0, -7e3, 1.0]), np.array([0, 1e-9, 0]), 0, np.inf)  # dead channels
    np.testing.assert_allclose([mean, deviation], [[0, 0, 1], [0, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("block", [QARepVGGBlock, RepVGGBlock])
def test_statistics_without_data(block):
    """Means are exact on the images of the statistics; deviations are so after one normalization, else about right."""
    network = network_of(build_measured_repvgg(block), batch=random_images(64))
    METHODS["equalize"].function(network)
    predicted = predict(network)
    for name in ("first", "second"):
        outputs = network.compute_linear_outputs(name)
        mean, deviation = outputs.mean((0, 1, 2)), outputs.std((0, 1, 2))
        assert np.max(np.abs(predicted.linear[name].mean - mean) / deviation) < 2e-3
        share = predicted.linear[name].deviation / deviation
        assert np.max(np.abs(share - 1)) < (2e-3 if block is QARepVGGBlock else 1)
        (inputs,) = network.calibration.compute_means(network.float, [network.layers[name].input])
        inputs = inputs.mean((0, 1, 2))
        assert name == "first" or np.mean(np.abs(predicted.inputs[name].mean - inputs) / inputs.max()) < 0.1
    for name, activations in next(iter(network.compute_activations())).items():
        prediction = predicted.activations[name]
        assert activations.min() >= prediction.low.min() - 1e-6 and activations.max() <= prediction.high.max() + 0.01


def test_dfq_without_data():
    """Shifts of the mean are taken out, and calibration images change nothing but the notes."""
    model = build_measured_repvgg()
    free = ptq.quantize(model, "dfq_data_free", 3)
    calibrated = ptq.quantize(model, "dfq_data_free", 3, calibration=random_images(64))
    for without, with_images in zip(free.get_weights(), calibrated.get_weights(), strict=True):
        np.testing.assert_allclose(without, with_images, rtol=1e-3, atol=1e-5)
    assert free.quantization_notes == ("layers without statistics, predicted from their inputs: logits",)
    note = calibrated.quantization_notes[1]
    assert note.startswith("standard deviations predicted without data differ from those on the calibration images by")
    network = network_of(model, 3, batch=random_images(64))
    METHODS["dfq_data_free"].function(network)
    expected = network.compute_linear_outputs("second")
    actual = network.compute_quantized_linear_outputs("second")
    shifts = [
        np.sum(np.square((actual + bias - expected).mean((0, 1, 2))))
        for bias in (network.get_quantized_bias("second"), network.bias("second"))
    ]
    assert shifts[0] < 0.5 * shifts[1]


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_dfq_without_data_on_a_saved_model(tmp_path, ending):
    """The statistics are saved with the fused model: the same kernels, biases and ranges, bit for bit."""
    model = build_measured_repvgg()
    model.save(tmp_path / f"fused{ending}")
    loaded = keras.models.load_model(tmp_path / f"fused{ending}")
    ptq.check_data_free(loaded, "dfq_data_free")
    expected, actual = (ptq.quantize(form, "dfq_data_free", 3, True).get_weights() for form in (model, loaded))
    for value, loaded_value in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(loaded_value, value)


def test_dfq_without_statistics():
    model = small_repvgg()
    without = keras.models.clone_model(model)
    with pytest.raises(ValueError, match=r"this model holds none: use what tf_repvgg\.fusion\.fuse returns"):
        ptq.quantize(without, "dfq_data_free")
    inputs = keras.Input(SIZE)
    features = RepVGGBlock(8, name="first")(inputs)
    features = keras.layers.Multiply(name="gate")([features, features])
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(features))
    with pytest.raises(ValueError, match="'gate': distributions cannot be followed through Multiply without data"):
        ptq.quantize(fuse(keras.Model(inputs, outputs)), "dfq_data_free")
    for method in ("equalize", "dfq", "dfq_data_free+bias_tune"):
        with pytest.raises(ValueError, match="there are no calibration images"):
            ptq.quantize(model, method)
    with pytest.raises(ValueError, match="there are no calibration images"):
        ptq.quantize(model, "dfq_data_free", calibration=[])


def test_without_images_nothing_shows_that_a_network_takes_pixels():
    with pytest.raises(ValueError, match="images are from 0 to 255, but methods without images need normalized ones"):
        ptq.quantize(build_measured_repvgg(), "dfq_data_free", input_range=(0.0, 255.0))
