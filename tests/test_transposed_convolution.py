"""Transposed convolutions, whose kernels have the input channels last, in everything that quantizes kernels."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion, tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import (
    QuantizedConv2DTranspose,
    cluster_quantize,
    learned_step_quantize,
    ptq,
    strip_cluster_quantize,
    strip_learned_step,
)
from tf_repvgg.quantization.qat.lsq import LearnedStep
from tf_repvgg.quantization.quantized_layers import apply_kernel, bias_of, kernel_of
from tf_repvgg.tflite.targets import TARGETS

layers = keras.layers
IMAGES = np.random.default_rng(0).uniform(-1, 1, [16, 5, 6, 3]).astype(np.float32)
GEOMETRIES = (
    {},
    {"strides": 2, "padding": "same"},
    {"strides": (2, 3), "padding": "valid", "output_padding": (1, 2)},
    {"strides": 2, "padding": "same", "output_padding": 0},
)


def make_model(before=(), after=(), **changes):
    """Four channels become two, so that a wrong axis of a kernel cannot go unnoticed."""
    up = layers.Conv2DTranspose(2, **{"kernel_size": 3, "name": "up"} | changes)
    model = keras.Sequential([keras.Input(IMAGES.shape[1:]), layers.Conv2D(4, 1, name="first"), *before, up, *after])
    generator = np.random.default_rng(0)
    for weight in model.weights:
        is_positive = "variance" in weight.name
        weight.assign(generator.uniform(0.5 if is_positive else -1, 1, weight.shape))
    return model


def relative_error(file, model):
    expected = model(IMAGES).numpy()
    return np.sqrt(np.mean(np.square(tflite.predict(file, IMAGES) - expected))) / np.std(expected)


def find_kernel(file):
    """The transposed convolution's codes and scale in a file, which has no other kernel of so many axes and sizes."""
    return tflite.weight_codes(file)[1]


@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_the_layer_with_another_kernel(changes):
    model = make_model(use_bias=False, **changes)
    layer, inputs = model.get_layer("up"), tf.constant(model.layers[0](IMAGES))
    kernel = kernel_of(layer)
    assert kernel.shape[2:] == (4, 2) and bias_of(layer).shape == (2,)
    signature = [tf.TensorSpec([None, None, None, 4])]
    with_free_size = tf.function(lambda values: apply_kernel(layer, values, kernel), input_signature=signature)
    for outputs in (apply_kernel(layer, inputs, kernel), with_free_size(inputs)):
        np.testing.assert_allclose(outputs, layer(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [{"use_bias": False}, {}], ids=["no bias", "zeros"])
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_without_a_bias(bias, activation):
    """TensorFlow's converter would not fuse the ReLU, and compute in float."""
    model = make_model(after=[layers.ReLU()] if activation == "linear" else [], activation=activation, **bias)
    if model.get_layer("up").use_bias:
        model.get_layer("up").bias.assign(np.zeros(2))
    quantized = ptq.quantize(model, "min_max", per_channel=True, calibration=IMAGES)
    for file in (tflite.convert(quantized), tflite.convert(model, IMAGES)):
        assert [operator.name for operator in tflite.operators(file)] == ["CONV_2D", "TRANSPOSE_CONV"]
        assert relative_error(file, model) < 0.03
    assert model.get_layer("up").activation is keras.activations.get(activation)


@pytest.mark.parametrize("changes", GEOMETRIES, ids=str)
def test_files(changes):
    """From float models, at 8 bits; and from quantized ones, at 4 bits, whose codes are in the file as they are."""
    model = make_model(activation="relu", **changes)
    assert relative_error(tflite.convert(model, IMAGES), model) < 0.03
    quantized = ptq.quantize(model, "min_max", weight_bits=4, per_channel=True, calibration=IMAGES)
    kernel = find_kernel(tflite.convert(quantized))
    layer = quantized.get_layer("up")
    assert isinstance(layer, QuantizedConv2DTranspose) and np.max(np.abs(kernel.codes)) == 7
    np.testing.assert_array_equal(kernel.codes, layer.get_quantized_kernel().codes)
    np.testing.assert_array_equal(kernel.scale, layer.scale)
    # Each output channel has a scale of its own: that of its largest weight.
    largest = np.max(np.abs(model.get_layer("up").kernel), axis=(0, 1, 3))
    np.testing.assert_allclose(kernel.scale * 7, largest, rtol=1e-5)


def test_a_file_of_16_bits_names_its_layers():
    model = make_model(strides=2)
    file = tflite.convert(ptq.quantize(model, "min_max", activation_bits=16, calibration=IMAGES))
    assert relative_error(file, model) < 0.02
    first, up = tflite.layers(tflite.convert(model, IMAGES), model, IMAGES)
    assert (first.layer, up.layer, up.weights) == ("first", "up", 9 * 4 * 2)
    assert up.weight_sqnr_db > 40 and up.activation_sqnr_db > 25


def test_methods_that_change_weights_keep_the_function():
    """Equalization moves factors into and out of the layer; biases are not absorbed into it."""
    model = make_model([layers.ReLU()], [layers.ReLU(), layers.Conv2D(3, 1, name="last")], strides=2)
    for method in ("equalize", "dfq", "adaquant"):
        network = ptq.quantize_network(model, method, calibration=IMAGES, per_channel=True, iterations=20)
        assert relative_error(tflite.convert(network.quantized), model) < 0.05
        if method == "equalize":
            np.testing.assert_allclose(network.float(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
            assert not any("first" in note or "up" in note for note in network.notes)
            assert np.ptp(network.divisors["first"]) > 0 and np.ptp(network.divisors["up"]) > 0


def test_distributions_are_not_followed_without_data():
    inputs = keras.Input((8, 8, 3))
    block = keras.Model(inputs, layers.Conv2DTranspose(2, 3, name="up")(RepVGGBlock(4, name="block")(inputs)))
    with pytest.raises(ValueError, match="'up': distributions cannot be followed through Conv2DTranspose"):
        ptq.quantize(fusion.fuse(block), "dfq_data_free", weight_bits=8)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_training(per_channel):
    """The wrapped layer computes what the stripped one and the file compute, on grids of the output channels."""
    model = make_model(strides=2, padding="same", activation="relu")

    def train(wrapped):
        wrapped.compile(keras.optimizers.SGD(1e-3), "mse")
        wrapped.fit(IMAGES, model(IMAGES), verbose=0)
        return wrapped

    clustered = train(cluster_quantize(model, 5, cluster_per_channel=per_channel, calibration=IMAGES))
    learned = train(learned_step_quantize(model, 4, per_channel=per_channel, calibration=IMAGES))
    (step,) = (layer.step for layer in learned.layers if isinstance(layer, LearnedStep) and layer.layer.name == "up")
    for trained, strip in ((clustered, strip_cluster_quantize), (learned, strip_learned_step)):
        stripped = strip(trained)
        np.testing.assert_allclose(stripped(IMAGES), trained(IMAGES), rtol=1e-4, atol=1e-5)
        file = tflite.convert(stripped)
        assert relative_error(file, stripped) < 0.05
        kernel = find_kernel(file)
        assert kernel.scale.shape == ((2,) if per_channel else (1,)) and kernel.codes.shape == (3, 3, 4, 2)
        if trained is clustered:
            parts = [kernel.codes[..., channel] for channel in range(2)] if per_channel else [kernel.codes]
            assert all(len(np.unique(part)) <= 5 for part in parts)
        else:
            np.testing.assert_allclose(kernel.scale, step, rtol=1e-6)


@pytest.mark.parametrize("fuse", [False, True], ids=["lowered", "fused"])
def test_a_normalization_becomes_part_of_the_layer(fuse):
    model = make_model(after=[layers.BatchNormalization(name="norm")], strides=2)
    plain = fusion.fuse(model) if fuse else model
    quantized = ptq.quantize(plain, "min_max", per_channel=True, calibration=IMAGES)
    file = tflite.convert(quantized)
    assert [operator.name for operator in tflite.operators(file)] == ["CONV_2D", "TRANSPOSE_CONV"]
    assert relative_error(file, model) < 0.03


def test_channels_first():
    inputs = keras.Input((3, 5, 6))
    outputs = layers.Conv2DTranspose(2, 3, strides=2, data_format="channels_first", activation="relu")(inputs)
    model, images = keras.Model(inputs, outputs), np.moveaxis(IMAGES, -1, 1)
    quantized = ptq.quantize(model, "min_max+bias_correct", per_channel=True, calibration=images)
    np.testing.assert_allclose(tflite.predict(tflite.convert(quantized), images), model(images), atol=0.03)


@pytest.mark.parametrize("changes", [{"padding": "same"}, {"output_padding": 1}], ids=str)
def test_sequences(changes):
    model = keras.Sequential([keras.Input((6, 3)), layers.Conv1DTranspose(2, 3, 2, activation="relu", **changes)])
    quantized = ptq.quantize(model, "min_max", weight_bits=6, per_channel=True, calibration=IMAGES[:, 0])
    file = tflite.convert(quantized)
    np.testing.assert_allclose(tflite.predict(file, IMAGES[:, 0]), model(IMAGES[:, 0]), atol=0.06)
    assert tflite.weight_codes(file)[0].codes.shape == (3, 1, 3, 2)


def test_int4_files_leave_it_in_int8():
    """LiteRT has no kernels for transposed convolutions with weights in INT4."""
    file = tflite.convert(make_model(strides=2), IMAGES, weight_bits=4)
    built = TARGETS["litert_int4"](file)
    assert built.record["left_in_int8"] == ["up/kernel"]
    np.testing.assert_array_equal(built.predict(IMAGES), built.predict_int8(IMAGES))


def test_an_offset_stays_before_the_layer():
    """Pixels of the output read different numbers of pixels, so that no bias takes an offset over; a factor may go."""
    model = make_model([layers.ReLU(), layers.Rescaling(2.0, 0.5)], strides=2)
    assert relative_error(tflite.convert(model, IMAGES), model) < 0.03


@pytest.mark.parametrize("changes", [{"padding": "same"}, {"padding": "same", "kernel_size": (2, 4)}, {}], ids=str)
def test_with_a_dilation_rate_the_layer_becomes_a_convolution(changes):
    """TensorFlow's converter writes one in float."""
    model = make_model(dilation_rate=2, activation="relu", **changes)
    file = tflite.convert(ptq.quantize(model, "min_max", per_channel=True, calibration=IMAGES))
    assert "TRANSPOSE_CONV" not in {operator.name for operator in tflite.operators(file)}
    assert relative_error(file, model) < 0.03
