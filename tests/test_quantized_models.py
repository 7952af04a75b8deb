"""Quantized models: where they round, what they save, and that their files compute the same."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert.interpreter import Interpreter
from helpers.networks import SIZE, assert_file_computes_the_model, quantize_by_one_step, random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import (
    ActivationQuantizer,
    QuantizedConv2D,
    QuantizedKernel,
    learned_step_quantize,
    ptq,
    quantize_activations,
    quantizers,
    strip_learned_step,
)


@pytest.mark.parametrize("minimum, maximum", [(-1.0, 127 / 128), (0.0, 6.0), (-0.013, 3.7), (-5.0, 0.0), (0.5, 2.0)])
def test_grid_by_definition(minimum, maximum):
    quantizer = ActivationQuantizer()
    quantizer.build((None, 4))
    quantizer.set_range(minimum, maximum)
    low, high = min(minimum, 0), max(maximum, 0)
    scale = (high - low) / 255
    zero_point = round(-128 - low / scale)
    values = np.linspace(low - 1, high + 1, 1001).astype("float32")
    values = values[np.abs(values / scale % 1 - 0.5) > 1e-3]  # ties
    codes = np.clip(np.round(values / scale) + zero_point, -128, 127)
    np.testing.assert_allclose(quantizer(values), (codes - zero_point) * scale, atol=1e-5)
    assert quantizer(np.zeros(1, "float32")).numpy() == 0
    np.testing.assert_allclose(quantizer.scale(), scale, rtol=1e-5)


def test_gradient_passes_inside_the_range_only():
    quantizer = ActivationQuantizer(fixed_range=(-1, 127 / 128))
    values = tf.constant([-2.0, -0.9, 0.3, 0.9, 1.5])
    with tf.GradientTape() as tape:
        tape.watch(values)
        outputs = quantizer(values, training=True)
    np.testing.assert_array_equal(tape.gradient(outputs, values), [0, 1, 1, 1, 0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_gradient_after_relu(bits, training):
    """In a graph. After a ReLU, training keeps only a mask of where gradients pass, and no values."""
    quantizer = ActivationQuantizer(nonnegative=True, bits=bits)
    quantizer.build((None,))
    quantizer.set_range(0, 2)
    quantizer.freeze()
    values = tf.constant([-1.0, -0.003, 0.0, 0.003, 1.99, 2.5])

    @tf.function
    def step(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = quantizer(tf.nn.relu(2 * values), training=training)
        return outputs, tape.gradient(outputs, values)

    outputs, gradient = step(values / 2)
    np.testing.assert_array_equal(outputs, quantizer(tf.nn.relu(values)))
    np.testing.assert_array_equal(gradient, [0, 0, 0, 2, 2, 0])
    operations = {operation.type for operation in step.get_concrete_function(values).graph.get_operations()}
    assert ("ReluGrad" in operations) is not training


def test_running_range():
    quantizer = ActivationQuantizer(momentum=0.75)
    assert np.all(np.isnan(quantizer(np.ones(3, "float32"))))  # no range yet
    quantizer(np.float32([-2, 6]), training=True)
    np.testing.assert_allclose(quantizer.range, [-2, 6])
    step = tf.function(lambda values: quantizer(values, training=True))
    step(tf.constant([-1.0, 10.0]))
    np.testing.assert_allclose(quantizer.range, [-1.75, 7])
    step(tf.constant([3.0, 7.0]))  # the range still includes zero
    np.testing.assert_allclose(quantizer.range, [-1.3125, 7])
    quantizer.freeze()
    step(tf.constant([-100.0, 100.0]))
    quantizer(np.float32([-100, 100]))
    np.testing.assert_allclose(quantizer.range, [-1.3125, 7])
    quantizer.freeze(False)
    step(tf.constant([0.0, 11.0]))
    np.testing.assert_allclose(quantizer.range, [-0.984375, 8])


def test_bad_quantizers():
    for momentum in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"momentum is {momentum}; it must be from 0 to 1"):
            ActivationQuantizer(momentum)
    with pytest.raises(ValueError, match="activation bits are 7; known: 8, 16"):
        ActivationQuantizer(bits=7)
    with pytest.raises(ValueError, match="must include zero"):
        ActivationQuantizer(fixed_range=(0.5, 1))
    quantizer = ActivationQuantizer(name="q")
    quantizer.build((None, 4))
    for bad in ((np.nan, 1), (0, np.inf), (1, -1)):
        with pytest.raises(ValueError, match=r"q: .* is not a range"):
            quantizer.set_range(*bad)


@pytest.mark.parametrize("bits, per_channel", [(8, True), (4, False), (3, True)])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_file_computes_what_the_model_computes(padding, bits, per_channel):
    model = quantize_by_one_step(small_repvgg(padding), bits, per_channel)
    names = [quantizer.name for quantizer in quantizers(model)]
    assert names == [f"{name}_quantizer" for name in ("image", "first", "second", "pool", "logits")]
    file = tflite.convert(model)
    expected = ["PAD"] * (padding == "symmetric") + ["CONV_2D", "CONV_2D", "MEAN", "FULLY_CONNECTED"]
    assert [operator.name for operator in tflite.operators(file)] == expected
    for name, in_file in zip(("first", "second", "logits"), tflite.weight_codes(file), strict=True):
        in_model = model.get_layer(name).get_quantized_kernel()
        np.testing.assert_array_equal(in_file.codes, in_model.codes)
        np.testing.assert_array_equal(in_file.scale, in_model.scale)
        assert np.max(np.abs(in_model.codes.astype(int))) == 2 ** (bits - 1) - 1
    assert_file_computes_the_model(model, file, random_images(8, seed=1))


def test_16_bit_activations(tmp_path):
    """They are on a symmetric grid, and the file computes with int16."""
    quantizer = ActivationQuantizer(bits=16)
    quantizer.build((None, 4))
    quantizer.set_range(-1.0, 4.0)
    np.testing.assert_allclose(quantizer.scale(), 4 / 32767, rtol=1e-6)
    codes = np.float32([-40000, -32767, -0.7, 0, 1.2, 32766.8, 50000])
    expected = np.float32([-32767, -32767, -1, 0, 1, 32767, 32767])
    np.testing.assert_allclose(quantizer(codes * (4 / 32767)), expected * (4 / 32767), rtol=1e-4)

    model = learned_step_quantize(small_repvgg(), 8, activation_bits=16, calibration=random_images())
    model.save(tmp_path / "m.keras")
    stripped = strip_learned_step(keras.models.load_model(tmp_path / "m.keras", compile=False))
    file = tflite.convert(stripped)
    (file_input,) = Interpreter(model_content=file).get_input_details()
    assert file_input["dtype"] == np.int16
    np.testing.assert_allclose(
        tflite.predict(file, random_images(8, seed=1)), stripped(random_images(8, seed=1)), atol=2e-3
    )
    assert tflite.predict(tflite.convert(stripped, inference_type="float32"), random_images(2)).shape == (2, 5)
    with pytest.raises(ValueError, match="inference_type is 'int8'; known for activations of 16 bits: int16, float32"):
        tflite.convert(stripped, inference_type="int8")


def test_16_bit_fixed_ranges():
    """Sigmoid, softmax and tanh have the scales that integer runtimes prescribe."""
    inputs = keras.Input(SIZE)
    features = keras.layers.Conv2D(4, 3, activation="sigmoid")(inputs)
    features = keras.layers.Conv2D(4, 3, activation="tanh")(features)
    features = keras.layers.GlobalAveragePooling2D()(features)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(features))
    trained = learned_step_quantize(model, 8, activation_bits=16, calibration=random_images())
    file = tflite.convert(strip_learned_step(trained))
    np.testing.assert_allclose(tflite.predict(file, random_images(4)), model(random_images(4)), atol=0.02)


@pytest.mark.parametrize("inference_type", ["uint8", "float32"])
def test_other_types_of_inputs_and_outputs(inference_type):
    model = quantize_by_one_step(small_repvgg())
    file = tflite.convert(model, inference_type=inference_type)
    assert_file_computes_the_model(model, file, random_images(8, seed=1))


@pytest.mark.parametrize("minimum, maximum, zero_point", [(-1, 1, -1), (-0.7, 0.1, 95)])
def test_the_file_has_the_same_grid(minimum, maximum, zero_point):
    """Even where zero falls between two codes, as in -1 .. 1."""
    model = quantize_by_one_step(small_repvgg())
    quantizers(model)[0].set_range(minimum, maximum)
    interpreter = Interpreter(model_content=tflite.convert(model))
    (details,) = interpreter.get_input_details()
    np.testing.assert_allclose(details["quantization"], ((maximum - minimum) / 255, zero_point), rtol=1e-6)
    np.testing.assert_allclose(
        quantizers(model)[0](np.float32([-9, 9])),
        (np.array([-128, 127]) - zero_point) * (maximum - minimum) / 255,
        rtol=1e-6,
    )


def test_saved_and_loaded(tmp_path):
    model = quantize_by_one_step(small_repvgg(), 4)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(random_images()), model(random_images()))
    assert tflite.convert(loaded) == tflite.convert(model)
    assert isinstance(loaded.get_layer("first"), QuantizedConv2D)


def model_of_many_operations():
    """Branches, squeeze-and-excite, separate ReLU layers, nested models, and layers that keep their input's grid."""
    inputs = keras.Input((8, 8, 3), name="image")
    nested_input = keras.Input((8, 8, 4))
    nested = keras.Model(nested_input, keras.layers.Conv2D(4, 1, name="conv")(nested_input), name="left")
    features = keras.layers.ReLU(name="separate_relu")(keras.layers.Conv2D(4, 3, padding="same", name="conv")(inputs))
    features = keras.layers.Add(name="add")([nested(features), features])
    gate = keras.layers.Conv2D(4, 1, activation="sigmoid", name="gate")(features)
    features = keras.layers.Multiply(name="scaled")([features, gate])
    features = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu6", name="depthwise")(features)
    pooled = keras.layers.MaxPooling2D(2, name="max")(features)
    averaged = keras.layers.AveragePooling2D(2, name="average")(features)
    features = keras.layers.Concatenate(name="both")([pooled, averaged])
    features = keras.layers.UpSampling2D(2, name="up")(features)
    features = keras.layers.Dropout(0.5, name="dropout")(keras.layers.Flatten(name="flat")(features))
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="dense")(features))


@pytest.mark.parametrize(
    "relu",
    [
        keras.layers.ReLU(),
        keras.layers.ReLU(6.0),
        keras.layers.ReLU(max_value=6),
        keras.layers.ReLU(negative_slope=0.25),
    ],
    ids=["plain", "6.0", "6", "slope"],
)
def test_relu_layers(relu):
    inputs = keras.Input(SIZE, name="image")
    features = keras.layers.Conv2D(8, 3, kernel_initializer=keras.initializers.RandomNormal(0, 1), name="conv")(inputs)
    features = type(relu).from_config(relu.get_config())(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(keras.layers.GlobalAveragePooling2D()(features)))
    batch = random_images()
    quantized = ptq.quantize(model, "min_max", calibration=batch)
    assert_file_computes_the_model(quantized, tflite.convert(quantized), batch)
    assert np.max(np.abs(quantized(batch) - model(batch))) < 0.05 * np.max(np.abs(model(batch)))


class AddedConstant(keras.layers.Layer):
    """A user's own layer that ends with a sum."""

    def call(self, inputs):
        return inputs + 0.25


def wide_conv():
    """A convolution with outputs whose grid is coarse beside that of a ReLU6."""
    return keras.layers.Conv2D(
        4, 3, padding="same", kernel_initializer=keras.initializers.RandomNormal(0, 4), name="conv"
    )


# {case: (layers up to a ReLU or ReLU6, what has a grid of its own before that)}
BEFORE_RELUS = {
    "dropout": ([wide_conv(), keras.layers.Dropout(0.5), keras.layers.ReLU(6.0)], []),
    "permuted": ([wide_conv(), keras.layers.Permute((2, 1, 3)), keras.layers.ReLU()], []),
    "nested": ([keras.Sequential([keras.Input(SIZE), wide_conv()]), keras.layers.ReLU(6.0)], []),
    "own layer": ([wide_conv(), AddedConstant(name="own"), keras.layers.ReLU(6.0)], ["conv"]),
    "leaky": ([wide_conv(), keras.layers.LeakyReLU(name="leaky"), keras.layers.ReLU(6.0)], ["conv", "leaky"]),
    "operator": ([wide_conv(), tf.abs, keras.layers.ReLU(6.0)], ["conv", "tf.math.abs"]),
    "join": ([lambda x: keras.layers.Concatenate(name="join")([wide_conv()(x), x]), keras.layers.ReLU(6.0)], ["join"]),
}


@pytest.mark.parametrize("case", BEFORE_RELUS)
def test_what_files_fuse_with_a_relu_has_no_grid_of_its_own(case):
    """The converter drops a quantizer before a ReLU that it fuses, and computes in float without one elsewhere."""
    before, expected = BEFORE_RELUS[case]
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    features = image = keras.Input(SIZE, name="image")
    for layer in before:
        features = layer(features)
    quantized = ptq.quantize(keras.Model(image, features), calibration=random_images())
    _, *names, _ = (quantizer.name.removesuffix("_quantizer") for quantizer in quantizers(quantized))
    assert names == expected
    tflite.convert(quantized)  # holds the file against the model, and refuses float operations


@pytest.mark.parametrize("last", [keras.layers.Flatten(), keras.layers.Permute((2, 1, 3))], ids=["flat", "permuted"])
@pytest.mark.parametrize("join", [keras.layers.Concatenate, keras.layers.Minimum])
def test_a_reshaping_after_layers_that_share_a_grid(join, last):
    """An input of these layers has a narrow grid of its own, which the converter then took for all."""
    image = keras.Input(SIZE, name="image")
    narrow = keras.layers.Conv2D(4, 3, padding="same", name="narrow")(image)
    model = keras.Model(image, [last(join()([narrow, wide_conv()(narrow)])), narrow])
    tflite.convert(ptq.quantize(model, calibration=random_images()))


def test_quantizers_are_placed_where_tflite_rounds():
    model = model_of_many_operations()
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([w + 0.1 for w in layer.get_weights()])
    quantized = quantize_by_one_step(model, batch=random_images(size=(8, 8, 3)))
    actual = [quantizer.name.removesuffix("_quantizer") for quantizer in quantizers(quantized)]
    expected = "image separate_relu left_conv add gate gate_activation scaled depthwise both dense dense_activation"
    assert sorted(actual) == sorted(expected.split())
    file = tflite.convert(quantized)
    names = [operator.name for operator in tflite.operators(file)]
    assert "DEQUANTIZE" not in names
    batch = random_images(8, (8, 8, 3), seed=1)
    # Rounding errors of many operations add up.
    assert np.max(np.abs(tflite.predict(file, batch) - quantized(batch).numpy())) <= 6.01 / 256
    assert np.max(np.abs(model(batch) - quantized(batch, training=False))) < 0.1


def test_a_layer_used_twice_has_a_quantizer_for_each_use():
    shared = keras.layers.Conv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, shared(shared(inputs)))
    quantized = quantize_by_one_step(model)
    assert [quantizer.name for quantizer in quantizers(quantized)][1:] == ["shared_quantizer", "shared_quantizer_2"]
    file = tflite.convert(quantized)
    assert_file_computes_the_model(quantized, file, random_images(4, (6, 6, 3)))


def test_an_activation_that_is_always_zero():
    inputs = keras.Input((6, 6, 3))
    dead = keras.layers.Conv2D(4, 3, activation="relu", bias_initializer=keras.initializers.Constant(-99.0))(inputs)
    bias = keras.initializers.Constant(0.5)
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1, bias_initializer=bias, name="after")(dead))
    quantized = quantize_by_one_step(model)
    batch = random_images(2, (6, 6, 3))
    np.testing.assert_allclose(quantized(batch), 0.5, atol=0.01)
    np.testing.assert_allclose(tflite.predict(tflite.convert(quantized), batch), 0.5, atol=0.01)


def test_refusals():
    model = quantize_activations(small_repvgg())
    with pytest.raises(ValueError, match="'image_quantizer' has no range yet"):
        tflite.convert(model)
    with pytest.raises(ValueError, match="holds its own calibration ranges; leave calibration out"):
        tflite.convert(model, random_images())
    quantized = quantize_by_one_step(small_repvgg())
    layer = quantized.get_layer("first")
    with pytest.raises(ValueError, match=r"'first': codes and scale have shapes \(3, 3, 3, 8\) and \(1,\)"):
        layer.set_quantized_kernel(QuantizedKernel(np.ones((3, 3, 3, 8), np.int8), np.float32([1])))
    layer.kernel.assign(layer.kernel + 0.001)
    with pytest.raises(ValueError, match="'first': the kernel is not on its grid"):
        tflite.convert(quantized)

    class OwnConvolution(keras.layers.Conv2D):
        """May do anything with its kernel."""

    own = keras.Sequential([keras.Input(SIZE), OwnConvolution(2, 3, name="own")])
    with pytest.raises(ValueError, match="'own' is a OwnConvolution, whose weights cannot be quantized"):
        quantize_by_one_step(own)


def test_float_operations_in_the_file_are_refused():
    inputs = keras.Input((6, 6, 3))
    features = keras.layers.Conv2D(4, 3)(ActivationQuantizer(fixed_range=(-1, 1))(inputs))
    model = keras.Model(inputs, ActivationQuantizer(fixed_range=(-1, 1))(keras.layers.Activation("swish")(features)))
    with pytest.raises(ValueError, match=r"in float; put an ActivationQuantizer after every operation"):
        tflite.convert(model)


def test_a_block_in_training_form_reads_a_grid():
    """It ends with a ReLU, which is not fused with what comes before the block."""
    inputs = keras.Input(SIZE)
    total = keras.layers.Add(name="add")([inputs, keras.layers.Conv2D(SIZE[-1], 1)(inputs)])
    model = quantize_activations(keras.Model(inputs, RepVGGBlock(4, name="block")(total)))
    assert [layer.name for layer in model.layers][-4:] == ["add", "add_quantizer", "block", "block_quantizer"]
