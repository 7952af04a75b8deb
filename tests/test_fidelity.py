"""Fidelity of layers: which layer an operator belongs to comes from the names in the file."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.integer_files import plain_model
from helpers.networks import random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.quantization import ptq
from tf_repvgg.tflite import flatbuffer

SIZE = (6, 6, 4)


def rename_weights(file, names):
    """The file with other names on its weights, in execution order."""
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    operators = [operator for operator in graph.operators if flatbuffer.weights_layout(flat, operator)]
    for operator, name in zip(operators, names, strict=True):
        flatbuffer.weights_tensor(graph, operator).name = name
    return flatbuffer.pack(flat)


def test_names_decide():
    """Not values: two layers of one shape whose names are exchanged are compared with each other's weights."""
    model = plain_model(
        keras.layers.Conv2D(4, 1, name="a"), keras.layers.Conv2D(4, 1, name="b"), keras.layers.GlobalAveragePooling2D()
    )
    images = random_images(8, SIZE)
    file = tflite.convert(model, images)
    exchanged = rename_weights(file, ["b/kernel", "a/kernel"])
    for content, names, fits in ((file, ["a", "b"], True), (exchanged, ["b", "a"], False)):
        layers = tflite.layers(content, model, images)
        assert [layer.layer for layer in layers] == names
        assert all((layer.weight_sqnr_db > 20) == fits for layer in layers)


def test_layers_of_one_name_in_nested_models():
    left, right = (plain_model(keras.layers.Conv2D(4, 1, name="conv"), name=name) for name in ("left", "right"))
    inputs = keras.Input(SIZE)
    model = keras.Model(inputs, keras.layers.Concatenate()([left(inputs), right(inputs)]))
    images = random_images(8, SIZE)
    layers = tflite.layers(tflite.convert(model, images), model, images)
    assert {layer.layer for layer in layers} == {"left_conv", "right_conv"}
    assert all(layer.weight_sqnr_db > 30 and layer.activation_sqnr_db is None for layer in layers)
    network = ptq.quantize_network(model, calibration=images)
    layers = tflite.layers(tflite.convert(network.quantized), network.float, images)
    assert {layer.layer for layer in layers} == {"left_conv", "right_conv"}
    assert all(layer.weight_sqnr_db > 30 and layer.activation_sqnr_db > 20 for layer in layers)


def test_a_layer_that_is_called_twice():
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
    inputs = keras.Input(SIZE)
    model = keras.Model(inputs, shared(keras.layers.ReLU()(shared(inputs))))
    images = random_images(8, SIZE)
    layers = tflite.layers(tflite.convert(model, images), model, images)
    assert [(layer.layer, layer.activation_sqnr_db) for layer in layers] == [("shared", None)] * 2


def test_files_without_names_are_refused():
    model, images = small_repvgg(), random_images(8)
    file = rename_weights(tflite.convert(model, images), ["model/first/Conv2D", "second/kernel", "logits/kernel"])
    with pytest.raises(ValueError, match="weights 'model/first/Conv2D' are not named after a layer of the model"):
        tflite.layers(file, model, images)
    renamed = tflite.with_weights(file, model)
    assert [layer.layer for layer in tflite.layers(renamed, model, images)] == ["first", "second", "logits"]


def test_files_of_other_models_are_refused():
    model = plain_model(keras.layers.Conv2D(4, 1, name="first"))
    images = random_images(8, SIZE)
    with pytest.raises(ValueError, match=r"weights 'first/kernel' have shape \(3, 3, 3, 8\).*\(1, 1, 4, 4\)"):
        tflite.layers(tflite.convert(small_repvgg(), random_images(4)), model, images)
    file = tflite.convert(model, images)
    with pytest.raises(ValueError, match="'first/kernel' are not named after a layer of the model"):
        tflite.layers(file, plain_model(keras.layers.Conv2D(4, 1, name="last")), images)
    assert np.isfinite(tflite.layers(file, model, images)[0].weight_sqnr_db)


def test_layers_that_become_others_in_a_file():
    """A separable convolution is two layers of a file, and both are compared."""
    model = plain_model(keras.layers.SeparableConv2D(4, 3, name="separable"))
    images = random_images(4, SIZE)
    layers = tflite.layers(tflite.convert(model, images), model, images)
    assert [layer.layer for layer in layers] == ["separable_depthwise", "separable"]
    assert all(layer.weight_sqnr_db > 30 for layer in layers)
