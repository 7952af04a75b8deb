"""A walk gives the values that a model run as a whole gives, and forgets what no layer ahead reads."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images
from helpers.ptq import network_of

from tf_repvgg.quantization.ptq import METHODS
from tf_repvgg.quantization.ptq.walk import Walk


def branching_model():
    """Two layers read one tensor, one of them a layer that is called twice; a sum, and a second output."""
    inputs = keras.Input((8, 8, 3))
    stem = keras.layers.Conv2D(4, 3, activation="relu", name="stem")(inputs)
    twice = keras.layers.Conv2D(4, 1, name="twice")
    depthwise = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(stem)
    both = keras.layers.Add()([twice(twice(stem)), keras.layers.Conv2D(4, 1, name="merge")(depthwise)])
    pooled = keras.layers.GlobalAveragePooling2D()(both)
    return keras.Model(
        inputs, [keras.layers.Dense(3, name="dense")(pooled), keras.layers.Dense(2, name="side")(pooled)]
    )


def test_values_are_those_of_the_whole_model():
    network = network_of(branching_model(), 8, batch=random_images(70, (8, 8, 3)))  # two batches
    METHODS["min_max"].function(network)
    names = ["stem", "depthwise", "merge", "dense", "side"]
    tensors = [network.quantized.get_layer(name).input for name in names]
    walk, means = (Walk(network.calibration, network.quantized, tensors) for _ in range(2))
    for name, tensor in zip(names, tensors, strict=True):
        network.set_bias(name, network.bias(name) + 0.1)  # layers run with the weights of the time when they are read
        (expected,) = network.calibration.compute(network.quantized, [tensor])
        np.testing.assert_array_equal(walk.compute(tensor), expected)
        np.testing.assert_allclose(means.compute_mean(tensor), expected.mean(0, keepdims=True), atol=1e-6)
        assert sum(map(len, walk._frontier.values())) <= 4  # two tensors at most, of two batches each
    assert not walk._frontier
    with pytest.raises(KeyError, match="has been read already"):
        walk.compute(tensors[0])
