"""Names of weights in integer files: which layer an operator belongs to."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.integer_files import plain_model
from helpers.networks import random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.quantization import QuantizedKernel, ptq, quantize_min_max
from tf_repvgg.tflite import flatbuffer, targets


def weight_names(file):
    """Names of the weight tensors, for each operator that has weights."""
    flat = flatbuffer.unpack(file)
    return [
        flatbuffer.tensor_name(flatbuffer.weights_tensor(graph, operator))
        for graph in flat.subgraphs
        for operator in graph.operators
        if flatbuffer.weights_layout(flat, operator) is not None
    ]


def test_weights_have_the_names_of_their_layers():
    """Also after quantization, and in the files of targets."""
    fused, names = small_repvgg(), ["first/kernel", "second/kernel", "logits/kernel"]
    assert weight_names(tflite.convert(fused, random_images(4))) == names
    quantized = tflite.convert(ptq.quantize(fused, weight_bits=4, calibration=random_images(4)))
    assert weight_names(quantized) == names
    (int4_file,) = targets.TARGETS["litert_int4"](quantized).files.values()
    assert weight_names(int4_file) == names


def two_towers(**options):
    """Two nested models, left and right, each with a layer of the name conv, and their outputs beside each other."""
    left, right = (
        plain_model(keras.layers.Conv2D(4, 1, name="conv", **options), name=name) for name in ("left", "right")
    )
    inputs = keras.Input((6, 6, 4))
    outputs = keras.layers.Concatenate()([left(inputs), right(keras.layers.ReLU()(inputs))])
    return keras.Model(inputs, outputs), left.get_layer("conv"), right.get_layer("conv")


def test_names_in_nested_models():
    model, left, right = two_towers()
    images = random_images(8, (6, 6, 4))
    kernels = {
        "left_conv": QuantizedKernel(np.full((1, 1, 4, 4), 3, np.int8), np.float32([0.1])),
        "right_conv": QuantizedKernel(np.full((1, 1, 4, 4), 5, np.int8), np.float32([0.1])),
    }
    file = tflite.convert(model, images)
    for layer, kernel in zip((left, right), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(kernel.codes, quantize_min_max(layer.kernel.numpy()).codes)
    file = tflite.with_weights(file, model, kernels=kernels)
    assert weight_names(file) == ["left_conv/kernel", "right_conv/kernel"]
    assert [int(kernel.codes.min()) for kernel in tflite.weight_codes(file)] == [3, 5]
    quantized = tflite.convert(ptq.quantize(model, calibration=images))
    assert weight_names(quantized) == ["left_conv/kernel", "right_conv/kernel"]


def test_codes_for_a_name_that_two_layers_have_are_refused():
    model, *_ = two_towers()
    file = tflite.convert(model, random_images(4, (6, 6, 4)))
    kernels = {"conv": QuantizedKernel(np.ones((1, 1, 4, 4), np.int8), np.float32([0.1]))}
    message = "kernels names 'conv', but 2 layers of the nested models have that name; use 'left_conv' or 'right_conv'"
    with pytest.raises(ValueError, match=message):
        tflite.with_weights(file, model, kernels=kernels)


def test_layers_that_are_equal_in_kernel_and_bias():
    """Nothing in the converter's file tells them apart; each has its name, and codes that are given for one are its."""
    model, *_ = two_towers(kernel_initializer=keras.initializers.HeNormal(seed=3))
    kernel = QuantizedKernel(np.full((1, 1, 4, 4), 3, np.int8), np.float32([0.1]))
    file = tflite.convert(model, random_images(8, (6, 6, 4)), kernels={"right_conv": kernel})
    assert weight_names(file) == ["left_conv/kernel", "right_conv/kernel"]
    left, right = tflite.weight_codes(file)
    assert np.all(right.codes == 3) and not np.all(left.codes == 3)


def test_names_of_layers_inside_of_layers():
    class Gate(keras.layers.Layer):
        """A layer of a user that holds another one."""

        def __init__(self):
            super().__init__()
            self.conv = keras.layers.Conv2D(4, 1, name="conv")

        def call(self, inputs):
            return inputs + self.conv(inputs)

    model = plain_model(keras.layers.Conv2D(4, 3, name="conv"), Gate())
    assert weight_names(tflite.convert(model, random_images(8, (6, 6, 4)))) == ["conv/kernel", "conv_/kernel"]


def test_a_layer_that_is_called_twice_has_one_name():
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, shared(keras.layers.ReLU()(shared(inputs))))
    file = tflite.convert(model, random_images(8, (6, 6, 4)))
    assert weight_names(file) == ["shared/kernel"] * 2
    flat = flatbuffer.unpack(file)
    first, second = (operator for operator in flat.subgraphs[0].operators if flatbuffer.weights_layout(flat, operator))
    assert first.inputs[flatbuffer.WEIGHTS_INPUT] == second.inputs[flatbuffer.WEIGHTS_INPUT]
