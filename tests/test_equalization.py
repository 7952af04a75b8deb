"""Equalization and absorption through every structure: the function stays, and the ranges that channels meet match."""

import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.networks import random_images
from helpers.ptq import network_of

from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.ptq import METHODS, Network, Options
from tf_repvgg.quantization.ptq.absorption import absorb_high_biases, find_absorbers
from tf_repvgg.quantization.ptq.channel_groups import find_channel_groups

layers = keras.layers
SIZE = (8, 8, 4)


def build(function, **options):
    """A model whose channels have weights of very different sizes."""
    inputs = keras.Input(SIZE, name="image")
    model = keras.Model(inputs, function(inputs), **options)
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if weights := layer.get_weights():
            sizes = np.exp(generator.normal(0, 1, weights[0].shape[-2:]))
            layer.set_weights([weights[0] * sizes, *(generator.normal(0, 0.5, bias.shape) for bias in weights[1:])])
    return model


def without_images(model):
    return Network(model, None, ptq.bits_by_layer(model, 8), False, Options())


def equalize(network, model):
    """Equalizes a network, which keeps its function; returns the names of the layers that changed."""
    before = {name: network.kernel(name) for name in network.layers}
    METHODS["equalize"].function(network)
    images = random_images(8, SIZE, seed=2)
    for actual, expected in zip(tf.nest.flatten(network.float(images)), tf.nest.flatten(model(images)), strict=True):
        assert np.max(np.abs(actual - expected)) < 1e-4 * np.max(np.abs(expected))
    return {name for name, kernel in before.items() if not np.allclose(kernel, network.kernel(name), rtol=0.01)}


def measure_written(network, name):
    kernel = network.kernel(name)
    return np.max(np.abs(kernel), axis=tuple(range(kernel.ndim - 1)))


def measure_read(network, name):
    kernel = network.kernel(name)
    return np.max(np.abs(kernel), axis=(*range(kernel.ndim - 2), kernel.ndim - 1))


def assert_match(*ranges):
    """Up to a factor of all channels, which changes no layer's rounding."""
    first, *others = (values / np.exp(np.mean(np.log(values))) for values in ranges)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=0.05)


def chain(x):
    y = layers.Conv2D(6, 3, activation="relu", name="conv")(x)
    y = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(layers.ZeroPadding2D()(y))
    y = layers.Conv2D(4, 1, use_bias=False, name="pointwise")(y)
    y = layers.LeakyReLU()(layers.AveragePooling2D(2, padding="same")(y))
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu", name="multiplied")(y)
    y = layers.Conv2D(6, 3, groups=2, padding="same", activation="relu", name="grouped")(y)
    return layers.Dense(3, name="logits")(layers.Flatten()(layers.UpSampling2D()(y)))


def test_chains_of_depthwise_and_grouped_layers():
    model = build(chain)
    network = without_images(model)
    assert equalize(network, model) == set(network.layers) and network.notes == []
    # Equation 11 with three layers.
    assert_match(
        measure_written(network, "conv"), measure_written(network, "depthwise"), measure_read(network, "pointwise")
    )
    # Both outputs of a channel differ; the larger one counts for its input. Groups read four channels each.
    assert_match(
        measure_written(network, "pointwise"), measure_written(network, "multiplied").reshape(4, 2).max(axis=1)
    )
    halves = np.split(np.abs(network.kernel("grouped")), 2, axis=-1)
    assert_match(measure_written(network, "multiplied"), np.append(*(np.max(half, axis=(0, 1, 3)) for half in halves)))
    # A dense layer reads each channel of the grouped one at all its pixels.
    assert_match(measure_written(network, "grouped"), measure_read(network, "logits").reshape(-1, 6).max(axis=0))
    for name in network.layers:
        assert np.all(network.divisors[name] > 0) and (name == "logits") == np.all(network.divisors[name] == 1)


def residual(x):
    """An inverted residual block, without activations where it adds, as in MobileNetV2."""
    stem = layers.Conv2D(5, 3, name="stem")(x)
    y = layers.Conv2D(7, 1, activation="relu", name="expand")(stem)
    y = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(y)
    y = layers.Add()([stem, layers.Conv2D(5, 1, name="project")(y)])
    y = layers.Maximum()([y, layers.Conv2D(5, 1, name="rival")(y)])
    return layers.Dense(3, name="logits")(layers.GlobalMaxPooling2D()(y))


def test_sums_share_one_factor():
    model = build(residual)
    network = network_of(model, 2)
    assert equalize(network, model) == set(network.layers) and network.notes == []
    network.compute_linear_outputs("expand")  # what else runs a part of the model does not break a chain
    groups = find_channel_groups(network)
    for name in ("project", "rival"):
        np.testing.assert_array_equal(groups.outputs[name], groups.outputs["stem"])
    for name in ("expand", "rival", "logits"):
        np.testing.assert_array_equal(groups.inputs[name], groups.outputs["stem"])
    for name in ("project", "rival"):
        np.testing.assert_allclose(network.divisors[name], network.divisors["stem"])
    assert_match(
        measure_written(network, "expand"), measure_written(network, "depthwise"), measure_read(network, "project")
    )


def measure_spread(network):
    """Standard deviation of the logarithm of the activations' ranges over channels, in the mean over tensors."""
    (activations,) = network.compute_activations()
    ranges = [np.max(np.abs(values), axis=tuple(range(values.ndim - 1))) for values in activations.values()]
    return np.mean([np.std(np.log(values)) for values in ranges])


def test_activations_count_by_their_step():
    """With a scale per channel, ranges of activations are matched too: the more, the more bits weights have."""
    model = build(residual)
    spreads = []
    for bits, per_channel in ((8, True), (2, True), (8, False)):
        network = network_of(model, bits, per_channel, random_images(32, SIZE))
        assert equalize(network, model) == set(network.layers)
        spreads.append(measure_spread(network))
    blind = without_images(model)
    equalize(blind, model)
    network = network_of(model, batch=random_images(32, SIZE))
    network.float.set_weights(blind.float.get_weights())
    assert spreads[0] < 0.9 * spreads[1] and spreads[1:] == pytest.approx(2 * [measure_spread(network)], rel=0.02)


def test_a_channel_that_is_small_in_one_place_does_not_grow_elsewhere():
    """Training has shrunk its weights, and left its bias: an activation as large as others, which would explode."""
    model = build(residual)
    kernel, bias = model.get_layer("depthwise").get_weights()
    kernel[:, :, 0] *= 1e-6
    bias[:] = 0.5
    model.get_layer("depthwise").set_weights([kernel, bias])
    network = network_of(model, 8, batch=random_images(32, SIZE))
    equalize(network, model)
    (activations,) = network.compute_activations()
    ranges = np.max(activations["depthwise_quantizer"], axis=(0, 1, 2))
    assert ranges[0] < 6 * np.median(ranges)


class Shifting(layers.MaxPooling2D):
    """A subclass of a layer that passes factors; it does not."""

    def call(self, inputs):
        return inputs + 1.0


def branches(x):
    """A gate, a concatenation, a layer that is called twice, and an activation that no factor passes."""
    y = layers.Conv2D(4, 3, padding="same", activation="relu", name="features")(x)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(layers.GlobalAveragePooling2D(keepdims=True)(y))
    y = layers.Concatenate()([layers.Multiply()([y, gate]), layers.Conv2D(2, 1, name="beside")(y)])
    shared = layers.Conv2D(6, 1, activation="relu", name="shared")
    y = shared(shared(y))
    left = layers.Conv2D(3, 1, name="left")(layers.Activation("tanh")(layers.Conv2D(3, 1, name="before_tanh")(y)))
    right = layers.Conv2D(3, 1, name="right")(Shifting(name="custom")(layers.Conv2D(3, 1, name="before_custom")(y)))
    return {"left": left, "right": right, "middle": layers.Conv2D(2, 1, name="middle")(layers.ReLU(threshold=0.0)(y))}


def test_only_what_is_safe_is_equalized():
    model = build(branches)
    network = without_images(model)
    assert equalize(network, model) == {
        "features",
        "gate",
        "beside",
        "shared",
        "before_tanh",
        "before_custom",
        "middle",
    }
    groups = find_channel_groups(network)
    np.testing.assert_array_equal(groups.outputs["shared"], groups.inputs["shared"])
    np.testing.assert_array_equal(groups.inputs["shared"][:4], groups.outputs["features"])
    assert network.notes == ["layers not equalized with the next one: gate, before_tanh, before_custom"]


@pytest.mark.parametrize("options, passes", [({"negative_slope": 0.25}, True), ({"threshold": 0.5}, False)])
def test_factors_pass_a_relu_only_where_it_is_homogeneous(options, passes):
    def function(x):
        return layers.Conv2D(2, 1, name="second")(layers.ReLU(**options)(layers.Conv2D(4, 3, name="first")(x)))

    model = build(function)
    network = without_images(model)
    assert bool(equalize(network, model)) is passes is not bool(network.notes)


def limit_outputs(x):
    y = layers.ReLU(6.0, name="relu6")(layers.Conv2D(4, 3, name="first")(x))
    y = layers.DepthwiseConv2D(3, activation="relu6", name="depthwise")(y)
    return layers.Conv2D(2, 1, name="second")(y)


def test_factors_pass_relu6_below_its_limit():
    """Channels that reach 6 keep their factor, others are not taken there; without images, no factor passes."""
    model, images = build(limit_outputs), random_images(32, SIZE)
    first = model.get_layer("first")
    linear = keras.Model(model.input, first.output)
    largest = np.max(linear(images), axis=(0, 1, 2))
    first.set_weights([values * np.float32([8, 3, 12, 1]) / largest for values in first.get_weights()])
    network = network_of(model, 8, batch=images)
    equalize(network, model)
    factors = network.divisors["first"]
    assert np.all(factors[[0, 2]] == 1) and np.all(factors[[1, 3]] != 1)
    assert np.all(np.float32([3, 1]) / factors[[1, 3]] <= 6.001)
    assert network.notes[0].startswith("channels not equalized, since they reach the limit of ReLU6: relu6 2 of 4")
    without = without_images(model)
    equalize(without, model)
    assert np.all(without.divisors["first"] == 1) and "relu6 4 of 4, depthwise 4 of 4" in without.notes[0]
    assert without.notes[1] == "layers not equalized with the next one: first, depthwise"


def test_a_change_of_the_function_is_undone(monkeypatch):
    """A function that changes, because of a range that float32 does not hold or of a wrong group, undoes everything."""
    monkeypatch.setattr("tf_repvgg.quantization.ptq.channel_groups._LIMITS", {"tanh": 1.0})
    wrong = build(lambda x: layers.Conv2D(2, 1)(layers.Conv2D(4, 3, activation="tanh", name="first")(x)))
    module = sys.modules["tf_repvgg.quantization.ptq.methods.equalize"]
    monkeypatch.setattr(module, "_measure_largest", lambda *_: [np.full(4, 1e-9)])
    network = network_of(wrong)
    assert equalize(network, wrong) == set() and np.all(network.divisors["first"] == 1)
    assert network.notes == ["equalization was undone: it changed the outputs of the float network"]


def absorbing(x):
    """Biases far above zero, before a depthwise, a grouped and a dense layer, and before two readers."""
    y = layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    y = layers.ReLU(name="relu")(layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(y))
    y = layers.Conv2D(8, 1, groups=2, activation="relu", name="grouped")(layers.MaxPooling2D()(y))
    return [layers.Conv2D(2, 1, name="beside")(y), layers.Dense(3, name="logits")(layers.Flatten()(y))]


def test_biases_are_absorbed_by_depthwise_and_grouped_layers():
    model = build(absorbing)
    for name in ("conv", "depthwise", "grouped"):
        layer = model.get_layer(name)
        (kernel, bias), scale = layer.get_weights(), np.float32(0.2)
        layer.set_weights([kernel * scale, bias + 20])
    network = network_of(model, batch=random_images(32, SIZE))
    readers = {absorber.layer.name: {layer.name for layer in absorber.readers} for absorber in find_absorbers(network)}
    assert readers == {"conv": {"depthwise"}, "depthwise": {"grouped"}, "grouped": {"beside", "logits"}}
    absorbed = absorb_high_biases(network)
    images = network.calibration.inputs[0]
    for actual, expected in zip(network.float(images), model(images), strict=True):
        assert np.max(np.abs(actual - expected)) < 0.02 * np.max(np.abs(expected))
    assert all(np.count_nonzero(amount) >= len(amount) / 2 for amount in absorbed.values())


def test_absorption_respects_padding_and_branches():
    """Zeros that are padded, a reader without a bias, a sum, and an output of the network."""

    def function(x):
        def convolve(tensor, name, **options):
            return layers.Conv2D(4, 3, padding="same", activation="relu", name=name, **options)(tensor)

        y = layers.DepthwiseConv2D(1, name="point")(layers.ZeroPadding2D()(convolve(x, "before_zeros")))
        y = convolve(layers.ReLU()(layers.ZeroPadding2D()(y)), "padding")
        y = convolve(y, "without_bias", use_bias=False)
        y = layers.Add()([y, convolve(y, "before_sum")])
        return convolve(y, "before_outputs")

    network = network_of(build(function))
    assert [(absorber.layer.name, absorber.pads) for absorber in find_absorbers(network)] == [("before_zeros", True)]
