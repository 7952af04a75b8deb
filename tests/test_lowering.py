"""Lowering: the same function, made of operations that integer files have."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion, graph, tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import (
    QuantizedLayer,
    cluster_quantize,
    learned_step_quantize,
    ptq,
    quantizers,
    strip_cluster_quantize,
    strip_learned_step,
)
from tf_repvgg.quantization.lowering import lower

layers = keras.layers
SIZE = (8, 8, 3)
VECTOR = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


def conv(name="conv", **options):
    return layers.Conv2D(4, 3, name=name, **options)


def norm(name="norm"):
    initializers = keras.initializers
    return layers.BatchNormalization(
        gamma_initializer=initializers.RandomUniform(-2, 2, seed=1),
        beta_initializer=initializers.RandomNormal(0, 1, seed=2),
        moving_mean_initializer=initializers.RandomNormal(0, 1, seed=3),
        moving_variance_initializer=initializers.RandomUniform(0.5, 2, seed=4),
        name=name,
    )


def build(function, dtype="float32"):
    keras.utils.set_random_seed(0)
    image = keras.Input(SIZE, name="image", dtype=dtype)
    return keras.Model(image, function(image))


def draw_images(count=16):
    return np.random.default_rng(0).uniform(-2, 2, (count, *SIZE)).astype("float32")


def assert_same_function(model, other):
    images = draw_images(4)
    np.testing.assert_allclose(other(images), model(images), rtol=1e-4, atol=1e-4)


def assert_file_follows(model, quantized, tolerance=0.05):
    """`convert` itself holds the file against the quantized model, and refuses float operations."""
    images = draw_images()
    expected = np.asarray(model(images))
    actual = tflite.predict(tflite.convert(quantized), images)
    assert np.max(np.abs(actual - expected)) < tolerance * np.max(np.abs(expected))


# What becomes part of a layer's weights, and leaves no layer of its own.
FOLDED = {
    "factors": lambda x: conv()(x) * 0.5 / VECTOR,
    "offsets": lambda x: 2.0 - (VECTOR + conv(use_bias=False)(x)),
    "negative": lambda x: -conv()(x),
    "bias": lambda x: tf.nn.bias_add(layers.Dense(4, name="conv")(x), VECTOR),
    "rescaling": lambda x: layers.Rescaling(2.0, 3.0)(conv()(x)),
    "depthwise": lambda x: layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv")(x) * np.arange(1.0, 7.0) + 1.0,
    "separable": lambda x: layers.SeparableConv2D(4, 3, name="conv")(x) * VECTOR,
    "norms": lambda x: norm()(norm("norm2")(layers.Dropout(0.5)(conv()(x)))),
    "norm after pooling": lambda x: layers.Rescaling(VECTOR)(layers.AveragePooling2D()(conv()(x))),
    "pixels": lambda x: conv(padding="same")(x / 255.0),
    "padded pixels": lambda x: conv()(layers.ZeroPadding2D()(x * 0.1)),
    "centered pixels": lambda x: conv()(layers.Normalization(mean=[0.5, 1.0, 1.4], variance=[2.0, 2.1, 2.2])(x)),
    "two readers": lambda x: (lambda y: conv()(y) - conv("conv2")(y))(x * 2.0 - 1.0),
    "groups": lambda x: conv(groups=2)(layers.ReLU()(conv("conv2")(x)) * 0.5 + 1.0),
    "depthwise before": lambda x: layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv")(x * [1.0, 1.5, 1.7] + 1.0),
    "gate": lambda x: (lambda y: conv()(y * layers.Activation("hard_sigmoid")(conv("gate", padding="same")(y))))(
        conv("conv2", padding="same")(x)
    ),
}
# What stays a convolution with a weight for each channel.
KEPT = {
    "norm before": lambda x: conv()(layers.ReLU()(norm()(x))),
    "norm of a sum": lambda x: layers.ReLU()(norm()(layers.Add()([x, x]))),
    "norm of features": lambda x: layers.Dense(2)(layers.ReLU()(norm()(layers.GlobalAveragePooling2D()(x)))),
    "offset before padding": lambda x: conv(padding="same")(layers.Rescaling(1 / 127.5, -1.0)(x)),
    "large offset": lambda x: conv()(x - 3.0),
    "factors that differ": lambda x: conv()(x * np.float32([1.0, 10.0, 100.0])),
    "shared": lambda x: (lambda shared: shared(shared(x)) * 0.5)(layers.Conv2D(3, 1)),
    "read twice": lambda x: (lambda y: layers.Add()([y, y * 0.5]))(conv()(x)),
    "output": lambda x: layers.Average()([x, layers.Conv2D(3, 1)(x), x]),
    "limit": lambda x: layers.ReLU(4.0)(x),
    "limit and slope": lambda x: layers.ReLU(1.0, negative_slope=0.1)(conv()(x)),
    "clip": lambda x: tf.clip_by_value(tf.minimum(tf.maximum(conv()(x), -0.7), 0.9), -0.5, 0.6),
    "prelu": lambda x: layers.PReLU(shared_axes=[1, 2], alpha_initializer="uniform")(conv()(x)),
    "elu": lambda x: layers.ELU(0.5)(conv(activation="elu")(x)),
    "selu": lambda x: tf.nn.selu(conv(activation="selu")(x)),
    "softsign": lambda x: conv(activation="softsign")(x),
    "hard swish": lambda x: x * (tf.nn.relu6(x + 3.0) * (1 / 6)),
    "negative factor before a maximum": lambda x: layers.MaxPooling2D()(-x),
}
# What becomes other layers without constants.
REWRITTEN = {
    "softplus": lambda x: tf.math.softplus(layers.Activation("mish")(conv(activation="softplus")(x))),
    "squares": lambda x: tf.square(x) + x**2,
    "sum of three": lambda x: tf.add_n([layers.Add()([x, x, x]), layers.Maximum()([x, x, -x]), x]),
    "dense on maps": lambda x: (lambda y: tf.concat([layers.Dense(3, activation="relu")(y), layers.ReLU()(y)], -1))(
        layers.Dense(5, use_bias=False)(x)
    ),
    "products": lambda x: tf.einsum("bhwc,cd->bhwd", tf.tensordot(x, np.eye(3, 5, dtype="f"), 1), np.ones((5, 2), "f")),
    "matrix": lambda x: tf.matmul(layers.Flatten()(x), np.ones((192, 2), np.float32)),
    "separable": lambda x: layers.SeparableConv2D(
        4, 3, 2, "same", depth_multiplier=2, activation="hard_sigmoid", use_bias=False
    )(x),
    "sequence": lambda x: layers.GlobalMaxPooling1D()(
        layers.MaxPooling1D(2)(
            norm()(layers.Conv1D(4, 3, padding="causal", dilation_rate=2)(layers.Reshape((64, 3))(x)))
        )
    ),
    "sequences": lambda x: layers.UpSampling1D(2)(
        layers.ZeroPadding1D((1, 2))(
            layers.Cropping1D((1, 2))(
                layers.AveragePooling1D(2, padding="same")(
                    layers.Conv1D(4, 3, 2, "same", activation="elu")(layers.Reshape((64, 3))(x))
                )
            )
        )
    ),
    "steps": lambda x: layers.TimeDistributed(layers.Dense(2, activation="hard_sigmoid"))(layers.Reshape((8, 24))(x)),
    "functions": lambda x: tf.concat([tf.sigmoid(x), tf.tanh(x), tf.nn.softmax(x), tf.nn.leaky_relu(x)], -1),
}


@pytest.mark.parametrize("case", FOLDED)
def test_constants_go_into_weights(case):
    model = build(FOLDED[case])
    lowered = lower(model)
    assert not graph.find_layers(lowered, QuantizedLayer)
    assert not graph.find_layers(lowered, layers.BatchNormalization)
    assert lowered.get_layer("conv")
    assert_same_function(model, lowered)
    assert lower(lowered) is lowered


@pytest.mark.parametrize("case", KEPT | REWRITTEN)
def test_operations_become_others(case):
    model = build((KEPT | REWRITTEN)[case])
    lowered = lower(model)
    assert lowered is not model
    assert not graph.find_layers(lowered, layers.BatchNormalization | layers.SeparableConv2D | layers.TimeDistributed)
    assert case not in KEPT or graph.find_layers(lowered, QuantizedLayer)
    assert_same_function(model, lowered)
    assert lower(lowered) is lowered


def test_what_needs_nothing_stays():
    def grid(x):
        y = x + np.ones((8, 8, 1), np.float32)  # a constant for each pixel
        return layers.ReLU(threshold=0.5)(tf.nn.relu6(y) if y is None else y)

    for function in (grid, lambda x: layers.BatchNormalization(axis=1)(conv()(x))):
        model = build(function)
        assert lower(model) is model
    with pytest.raises(ValueError, match="functional"):
        lower(layers.Dense(2))


def test_equal_relus_are_computed_once():
    """The converter does so, and would fuse what remains with the convolution, which then has no grid of its own."""

    def read_twice(x):
        y = conv()(x)
        relus = [layers.ReLU()(y), layers.Activation("relu")(y), tf.nn.relu(y), layers.ReLU(6.0)(y), tf.nn.relu6(y)]
        return [layers.Conv2D(2, 1)(relu) for relu in relus]

    model = build(read_twice)
    lowered = lower(model)
    assert len([layer for layer in lowered.layers if "relu" in layer.name]) == 2
    for expected, actual in zip(model(draw_images()), lowered(draw_images()), strict=True):
        np.testing.assert_array_equal(expected, actual)
    tflite.convert(ptq.quantize(lowered, "mse", calibration=draw_images()))


def test_nested_models_and_shared_layers():
    inner = keras.Sequential([keras.Input(SIZE), norm(), layers.Conv2D(3, 1, activation="elu", name="conv")], name="in")
    model = build(lambda x: inner(inner(x)) * 0.5)
    lowered = lower(model)
    assert_same_function(model, lowered)
    assert [layer.name for layer in graph.find_layers(lowered, layers.Conv2D)] == ["conv"]


def mix(x):
    """Several kinds of operations in one model, each before a nonlinearity or a second reader."""
    y = layers.ReLU()(norm("stem_norm")(x))
    y = layers.SeparableConv2D(4, 3, activation="elu", name="a")(y)
    y = layers.Average()([y, layers.PReLU(shared_axes=[1, 2], alpha_initializer="uniform")(y * VECTOR)])
    y *= layers.Dense(4, activation="hard_sigmoid", name="gate")(layers.GlobalAveragePooling2D(keepdims=True)(y))
    return layers.Dense(5, name="logits")(layers.ReLU()(norm()(layers.GlobalAveragePooling2D()(y)))) / 3.0


def mix_few(x):
    y = layers.Conv2D(4, 3, activation="hard_sigmoid", name="a")(layers.Rescaling(2.0, 1.0)(layers.ReLU(2.0)(x)))
    return layers.Dense(5, name="logits")(layers.ReLU()(norm()(layers.GlobalAveragePooling2D()(y)))) / 3.0


@pytest.mark.parametrize(("function", "bits"), [(mix, 8), (mix_few, 16)])
def test_files_after_ptq(function, bits):
    model = build(function)
    quantized = ptq.quantize(model, "equalize", calibration=draw_images(), activation_bits=bits)
    assert_file_follows(model, quantized)


def test_files_of_float_models():
    def function(x):
        y = layers.Conv1D(4, 3, padding="causal", activation="softplus")(layers.Reshape((64, 3))(x))
        return layers.GlobalMaxPooling1D()(layers.MaxPooling1D(2)(tf.minimum(y, 1.5) - VECTOR))

    model = build(function)
    actual = tflite.predict(tflite.convert(model, draw_images()), draw_images())
    np.testing.assert_allclose(actual, model(draw_images()), atol=0.1)


def test_only_kernels_are_clustered_and_trained():
    model = build(mix_few)
    clustered = cluster_quantize(model, {"a": 32, ".*": 64}, calibration=draw_images())
    assert {layer.name for layer in clustered.layers if layer.trainable_weights} == {"cluster_a", "cluster_logits"}
    assert_file_follows(model, strip_cluster_quantize(clustered), 0.15)
    trained = learned_step_quantize(model, "a=4,logits=8", calibration=draw_images())
    assert [layer.weight_bits for layer in trained.layers if layer.trainable_weights] == [4, 8]
    assert np.all(np.isfinite(strip_learned_step(trained)(draw_images())))


def test_constants_keep_8_bits_and_whole_precision():
    """A weight for each channel is exact at any width, even where a factor is zero or next to nothing."""

    def function(x):
        y = layers.Conv2D(4, 1, name="conv")(x)
        return layers.Add()([y, layers.Rescaling(np.float32([0.0, 1e-30, 1e-3, 1e3]), VECTOR)(y)])

    model = build(function)
    quantized = ptq.quantize(model, weight_bits="conv=2", calibration=draw_images(), activation_bits=16)
    assert quantized.get_layer("conv").get_quantized_kernel().codes.max() == 1
    assert_file_follows(quantized, quantized)
    assert ptq.dequantize(model, quantized).get_layer("rescaling").per_channel


def test_pixels_of_integers():
    model = build(lambda x: layers.Conv2D(4, 3, name="conv")(tf.cast(x, tf.float32) / 127.5 - 1.0), dtype="uint8")
    pixels = np.random.default_rng(0).integers(0, 256, (8, *SIZE), dtype=np.uint8)
    file = tflite.convert(ptq.quantize(model, calibration=pixels), inference_type="uint8")
    assert {operator.name for operator in tflite.operators(file)} <= {"CONV_2D", "QUANTIZE"}
    actual = tflite.predict(file, pixels.astype(np.float32))
    np.testing.assert_allclose(actual, model(pixels), atol=0.05)


def test_statistics_follow_the_constants():
    fused = fusion.fuse(build(lambda x: RepVGGBlock(4, name="block", activation="linear")(x) * -2.0 + VECTOR))
    before, after = (fusion.pre_activation_statistics(model)["block"] for model in (fused, lower(fused)))
    np.testing.assert_allclose(after.mean, before.mean * -2 + VECTOR, rtol=1e-5)
    np.testing.assert_allclose(after.variance, before.variance * 4, rtol=1e-5)


def test_pooling_that_a_concatenation_and_others_read():
    """Its values are clipped to the range of the concatenation for the concatenation only."""

    def function(x):
        y = layers.AveragePooling2D()(conv(padding="same")(x))
        return layers.Dense(2)(layers.Flatten()(layers.Concatenate()([y, y, conv("b", padding="same")(y)])))

    model = build(function)
    quantized = ptq.quantize(model, calibration=draw_images())
    assert "conv_quantizer" in {quantizer.name for quantizer in quantizers(quantized)}
    assert_file_follows(model, quantized)


@pytest.mark.parametrize("layer", [layers.Conv2D(4, 3, name="conv"), layers.SeparableConv2D(4, 3, name="conv")])
def test_fuse_merges_normalizations_behind_dropout_and_one_another(layer):
    model = build(lambda x: norm("last")(layers.GaussianNoise(0.1)(norm()(layers.Dropout(0.5)(layer(x))))))
    fused = fusion.fuse(model)
    assert not graph.find_layers(fused, layers.BatchNormalization)
    assert type(fused.get_layer("conv")) is layers.Conv2D
    assert_same_function(model, fused)
    read_twice = fusion.fuse(build(lambda x: (lambda y: norm("last")(y) + y)(norm()(conv()(x)))))
    assert [norm.name for norm in graph.find_layers(read_twice, layers.BatchNormalization)] == ["last"]
