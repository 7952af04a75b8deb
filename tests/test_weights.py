"""Weights in integer files: exact codes and biases, whatever layers share or lack."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.integer_files import (
    assert_computes_what_it_says,
    make_repvgg_with_biases,
    plain_layers,
    plain_model,
    read_biases,
    read_tensors,
)
from helpers.networks import SIZE, random_images
from helpers.random_weights import randomize

from tf_repvgg import tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import QuantizedKernel, quantize_min_max


@pytest.fixture(scope="module")
def fused():
    keras.utils.set_random_seed(0)
    return make_repvgg_with_biases()


@pytest.fixture(scope="module")
def file(fused):
    return tflite.convert(fused, random_images())


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_file_holds_exactly_the_codes(fused, file, bits, per_channel):
    rewritten = tflite.with_weights(file, fused, bits, per_channel)
    layers = plain_layers(fused)
    kernels, biases = tflite.weight_codes(rewritten), read_biases(rewritten)
    assert len(kernels) == len(biases) == len(layers) == 3
    for layer, kernel, (bias, bias_scale, input_scale) in zip(layers, kernels, biases, strict=True):
        expected = quantize_min_max(layer.kernel.numpy(), bits, per_channel)
        np.testing.assert_array_equal(kernel.codes, expected.codes)
        np.testing.assert_array_equal(kernel.scale, expected.scale)
        assert np.max(np.abs(kernel.codes.astype(int))) == 2 ** (bits - 1) - 1
        np.testing.assert_allclose(bias_scale, np.float64(input_scale) * expected.scale, rtol=1e-6)
        assert np.all(np.abs(bias - layer.bias.numpy() / np.float64(bias_scale)) <= 0.5 + 1e-3)
    # And the interpreter reads the same: int8 weights, the scales, zero points of zero.
    interpreter, tensors = read_tensors(rewritten)
    first = next(t for t in tensors.values() if tuple(t["shape"]) == (8, 3, 3, 3))
    assert first["dtype"] == np.int8
    np.testing.assert_array_equal(np.moveaxis(interpreter.get_tensor(first["index"]), 0, -1), kernels[0].codes)
    parameters = first["quantization_parameters"]
    np.testing.assert_array_equal(parameters["scales"], kernels[0].scale)
    assert np.all(parameters["zero_points"] == 0)
    assert len(parameters["scales"]) == (8 if per_channel else 1)


def test_given_codes_are_written_as_they_are(fused, file):
    """Any codes a method chooses, a codebook's for instance, per tensor or per channel, Dense included."""
    generator = np.random.default_rng(0)
    kernels = {
        "second": QuantizedKernel(
            generator.choice([-90, -3, 0, 8, 127], (3, 3, 8, 8)).astype(np.int8), np.float32([0.01])
        ),
        "logits": QuantizedKernel(
            generator.integers(-7, 8, (8, 5)).astype(np.int8), generator.uniform(0.01, 0.1, 5).astype(np.float32)
        ),
    }
    for rewritten in (
        tflite.with_weights(file, fused, kernels=kernels),
        tflite.convert(fused, random_images(), kernels=kernels),
    ):
        first, second, logits = tflite.weight_codes(rewritten)
        for kernel, expected in ((second, kernels["second"]), (logits, kernels["logits"])):
            np.testing.assert_array_equal(kernel.codes, expected.codes)
            np.testing.assert_array_equal(kernel.scale, expected.scale)
        np.testing.assert_array_equal(first.codes, quantize_min_max(fused.get_layer("first").kernel.numpy()).codes)
        images = random_images(4)
        assert_computes_what_it_says(rewritten, images)


def test_codes_for_unknown_layers_are_refused(fused, file):
    """A misspelt name must not leave the layer silently rounded by min-max."""
    kernels = {"secnd": quantize_min_max(fused.get_layer("second").kernel.numpy(), 4)}
    with pytest.raises(ValueError, match="secnd"):
        tflite.with_weights(file, fused, kernels=kernels)


def test_codes_of_another_shape_are_refused(fused, file):
    kernels = {"second": quantize_min_max(fused.get_layer("first").kernel.numpy(), 4)}
    with pytest.raises(ValueError, match="second"):
        tflite.with_weights(file, fused, kernels=kernels)


def test_given_codes_that_leave_no_room_for_a_bias(fused, file):
    kernels = {"first": QuantizedKernel(np.ones((3, 3, 3, 8), np.int8), np.float32([1e-12]))}
    with pytest.raises(ValueError, match=r"layer 'first': the bias .* overflows int32.*use a larger weight scale"):
        tflite.with_weights(file, fused, kernels=kernels)


def test_more_bits_are_closer_to_float(fused, file):
    images = random_images(8, seed=1)
    expected = fused(images).numpy()
    errors = [
        np.sqrt(np.mean((tflite.predict(tflite.with_weights(file, fused, bits), images) - expected) ** 2))
        for bits in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_convert_and_with_weights_agree(fused, file):
    assert tflite.convert(fused, random_images(), weight_bits=4, per_channel=False) == tflite.with_weights(
        file, fused, 4, per_channel=False
    )


def test_rewriting_twice_is_rewriting_once(fused, file):
    """The way back from few bits: layers are recognized in the calibrated file, which holds 8 bits."""
    once = tflite.with_weights(file, fused, 8, per_channel=False)
    assert tflite.with_weights(once, fused, 4) == tflite.with_weights(file, fused, 4)
    assert len(tflite.with_weights(once, fused, 8)) == len(file)


def test_dead_channels(fused):
    """A channel of zero weights is its bias, exactly on its grid, next to living channels."""
    conv = keras.layers.Conv2D(4, 3, padding="same", name="conv")
    model = plain_model(conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, name="dense"))
    kernel = conv.kernel.numpy()
    kernel[..., 1] = 0
    conv.set_weights([kernel, np.float32([0.1, 0.7, -0.2, 0])])
    images = random_images(8, (6, 6, 4))
    for per_channel in (False, True):
        file = tflite.convert(model, images, per_channel=per_channel)
        codes, _ = tflite.weight_codes(file)
        assert np.all(codes.codes[..., 1] == 0) and np.all(codes.scale > 0)
        assert_computes_what_it_says(file, images)
        np.testing.assert_allclose(tflite.predict(file, images), model(images), atol=0.05)


@pytest.mark.parametrize(
    "tiny, bias", [(1e-8, 3.0), (1e-12, 3.0), (1e-30, 3.0), (1e-38, 3.0), (1e-12, 1e-20), (1e-30, 0.0)]
)
def test_nearly_dead_channels(tiny, bias):
    """The scale that such weights ask for would let a large bias overflow its 32 bits."""
    conv = keras.layers.Conv2D(4, 3, padding="same", name="conv")
    model = plain_model(conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, name="dense"))
    kernel = conv.kernel.numpy()
    kernel[..., 2] *= tiny
    biases = np.float32([0.1, -0.3, bias, 0.2])
    conv.set_weights([kernel, biases])
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(model, images)
    for rewritten in (file, tflite.with_weights(file, model, per_channel=False)):
        codes, scale, _ = read_biases(rewritten)[0]
        np.testing.assert_allclose(codes * np.float64(scale), biases, atol=1e-4)
        assert_computes_what_it_says(rewritten, images)
        np.testing.assert_allclose(tflite.predict(rewritten, images), model(images), atol=0.1)


def test_layers_without_bias():
    model = plain_model(
        keras.layers.Conv2D(5, 3, use_bias=False, activation="relu", name="conv"),
        keras.layers.Conv2D(6, 1, name="with_bias", bias_initializer=keras.initializers.Constant(0.5)),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(7, use_bias=False, name="dense"),
    )
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(model, images)
    assert len(tflite.weight_codes(file)) == 3
    assert_computes_what_it_says(file, images)
    assert np.max(np.abs(tflite.predict(file, images) - model(images))) < 0.05 * np.max(np.abs(model(images)))


def test_layers_with_the_same_kernel_keep_their_own_biases():
    """Identical kernels share one buffer in the file; their layers differ in bias alone."""
    kernel = keras.initializers.HeNormal(seed=3)
    first, second = (
        keras.layers.Conv2D(4, 3, padding="same", kernel_initializer=kernel, name=name) for name in ("first", "second")
    )
    inputs = keras.Input((6, 6, 4))
    features = second(keras.layers.ReLU()(first(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(3, name="dense")(keras.layers.GlobalAveragePooling2D()(features)))
    np.testing.assert_array_equal(first.kernel, second.kernel)
    first.bias.assign([1.0, 0.5, 0.2, 0.1])
    second.bias.assign([-2.0, 2.0, 0.0, -0.5])
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(model, images)
    for layer, (codes, scale, _) in zip((first, second), read_biases(file), strict=False):
        np.testing.assert_allclose(codes * np.float64(scale), layer.bias, atol=1e-3)
    assert_computes_what_it_says(file, images)


def test_layers_that_share_a_tensor_in_the_file_are_separated():
    """Layers with equal kernels, which the converter merges; other codes are given for the first."""
    kernel = keras.initializers.HeNormal(seed=3)
    first, second = (
        keras.layers.Conv2D(4, 3, padding="same", kernel_initializer=kernel, bias_initializer=bias, name=name)
        for name, bias in (("first", "ones"), ("second", keras.initializers.Constant(0.9)))
    )
    inputs = keras.Input((6, 6, 4))
    features = second(keras.layers.ReLU()(first(inputs)))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(features))
    given = quantize_min_max(first.kernel.numpy(), 3)
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(model, images, kernels={"first": given})
    first_written, second_written = tflite.weight_codes(file)
    np.testing.assert_array_equal(first_written.codes, given.codes)
    np.testing.assert_array_equal(second_written.codes, quantize_min_max(first.kernel.numpy()).codes)
    assert_computes_what_it_says(file, images)


@pytest.mark.parametrize("tiny", [1.0, 1e-4], ids=["one weight tensor", "one for each use"])
def test_a_layer_used_twice_has_a_bias_for_each_use(tiny):
    """A head shared by feature maps of unlike ranges. Where a bias needs other weight scales, tensors are parted."""
    shared = keras.layers.Conv2D(5, 3, padding="same", name="shared", bias_initializer=keras.initializers.Constant(0.3))
    inputs = keras.Input((6, 6, 4))
    small = keras.layers.Conv2D(4, 1, activation="relu", kernel_initializer=keras.initializers.Constant(1e-3))(inputs)
    both = keras.layers.Concatenate()([shared(inputs), shared(small)])
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(both)))
    shared.kernel.assign(shared.kernel * np.float32([1, 1, 1, tiny, tiny**2]))
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(model, images)
    uses = [bias for bias in read_biases(file) if len(bias[0]) == 5]
    kernels = [kernel for kernel in tflite.weight_codes(file) if kernel.codes.shape == (3, 3, 4, 5)]
    assert len(uses) == len(kernels) == 2
    assert np.array_equal(kernels[0].scale, kernels[1].scale) == (tiny == 1)
    for (codes, scale, input_scale), kernel in zip(uses, kernels, strict=True):
        np.testing.assert_allclose(codes * np.float64(scale), 0.3, atol=1e-3)
        np.testing.assert_allclose(scale, np.float64(input_scale) * kernel.scale, rtol=1e-6)
    expected = model(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.05 * np.max(np.abs(expected))


@pytest.fixture(scope="module")
def depthwise_model():
    keras.utils.set_random_seed(0)
    model = plain_model(
        keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu", name="double"),
        keras.layers.DepthwiseConv2D((3, 2), strides=2, use_bias=False, name="strided"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, name="dense"),
    )
    # Channels of unlike ranges, so that a scale on the wrong channel shows.
    model.get_layer("double").depthwise_kernel.assign(
        model.get_layer("double").depthwise_kernel * np.linspace(0.2, 3, 8).reshape(4, 2)
    )
    model.get_layer("double").bias.assign(np.linspace(-0.5, 1, 8))
    return model


def as_grouped(kernel):
    """A depthwise kernel as the grouped convolution it is."""
    return kernel.numpy().reshape(*kernel.shape[:2], 1, -1)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_depthwise_convolutions_code_for_code(depthwise_model, bits, per_channel):
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(depthwise_model, images, weight_bits=bits, per_channel=per_channel)
    names = [operator.name for operator in tflite.operators(file)]
    assert names == ["DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED"]
    for name, written in zip(("double", "strided"), tflite.weight_codes(file)[:2], strict=True):
        kernel = as_grouped(depthwise_model.get_layer(name).depthwise_kernel)
        expected = quantize_min_max(kernel, bits, per_channel)
        np.testing.assert_array_equal(written.codes, expected.codes)
        np.testing.assert_array_equal(written.scale, expected.scale)
        np.testing.assert_allclose(written.dequantize(), kernel, atol=0.51 * np.max(expected.scale))
    _, tensors = read_tensors(file)
    double = next(tensor for tensor in tensors.values() if tuple(tensor["shape"]) == (1, 3, 3, 8))
    assert double["quantization_parameters"]["quantized_dimension"] == 3
    assert len(double["quantization_parameters"]["scales"]) == (8 if per_channel else 1)
    assert_computes_what_it_says(file, images)
    if bits == 8:
        expected = depthwise_model(images).numpy()
        assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.05 * np.max(np.abs(expected))


def test_given_codes_of_a_depthwise_convolution(depthwise_model):
    generator = np.random.default_rng(0)
    codes = generator.choice([-100, -7, 0, 30, 127], (3, 3, 1, 8)).astype(np.int8)
    given = QuantizedKernel(codes, generator.uniform(0.01, 0.02, 8).astype(np.float32))
    images = random_images(8, (6, 6, 4))
    file = tflite.convert(depthwise_model, images, kernels={"double": given})
    np.testing.assert_array_equal(tflite.weight_codes(file)[0].codes, codes)
    np.testing.assert_array_equal(tflite.weight_codes(file)[0].scale, given.scale)
    assert_computes_what_it_says(file, images)
    wrong = QuantizedKernel(codes.reshape(3, 3, 4, 2), given.scale)
    with pytest.raises(ValueError, match=r"'double': the codes have shape \(3, 3, 4, 2\), its kernel \(3, 3, 1, 8\)"):
        tflite.with_weights(file, depthwise_model, kernels={"double": wrong})


def test_grouped_and_dilated_convolutions():
    inputs = keras.Input((9, 9, 4))
    features = RepVGGBlock(8, groups=2, name="grouped")(inputs)
    features = RepVGGBlock(8, dilation_rate=2, name="dilated")(features)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(features)))
    randomize(model)
    fused = fuse(model)
    images = random_images(8, (9, 9, 4))
    file = tflite.convert(fused, images)
    for layer, kernel in zip(plain_layers(fused), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(kernel.codes, quantize_min_max(layer.kernel.numpy()).codes)
    expected = fused(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.08 * np.max(np.abs(expected))


def test_layers_that_cannot_be_written_are_named(file):
    inputs = keras.Input(SIZE)
    model = keras.Model(inputs, keras.layers.SeparableConv2D(2, 3, name="separable")(inputs))
    with pytest.raises(ValueError, match="'separable' is a SeparableConv2D, whose weights cannot be written on a grid"):
        tflite.with_weights(file, model, weight_bits=4)


def test_a_file_of_another_model_is_refused(fused, file):
    keras.utils.set_random_seed(7)
    with pytest.raises(ValueError, match="are those of no layer of the model"):
        tflite.with_weights(file, make_repvgg_with_biases(), 4)
    for content in (b"", b"short", b"\0" * 100, b"PK" + file):
        with pytest.raises(ValueError, match="not a TFLite file"):
            tflite.operators(content)


def test_activations_that_are_zero_on_all_calibration_images():
    """XNNPACK refuses to load what the converter makes of an activation that is always zero."""
    model = plain_model(
        keras.layers.Conv2D(4, 3, activation="relu", name="dead", bias_initializer=keras.initializers.Constant(-99.0)),
        keras.layers.Conv2D(4, 3, name="after", bias_initializer=keras.initializers.Constant(0.5)),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3),
    )
    images = random_images(4, (6, 6, 4))
    outputs = tflite.predict(tflite.convert(model, images), images)
    np.testing.assert_allclose(outputs, model(images), atol=0.02)
