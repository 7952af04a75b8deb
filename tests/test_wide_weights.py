"""Weights that keep 8 bits although fewer were requested: right in the file, and named."""

import contextlib
import logging

import numpy as np
import pytest
import tf_keras as keras
from helpers.integer_files import plain_model
from helpers.networks import random_images

from tf_repvgg import tflite
from tf_repvgg.quantization import ptq


class _Product(keras.layers.Layer):
    """A layer of a user: a product with a matrix of its own."""

    def build(self, input_shape):
        self.matrix = self.add_weight("matrix", [input_shape[-1], 24])
        super().build(input_shape)

    def call(self, inputs):
        return inputs @ self.matrix


class _Wrapper(keras.layers.Layer):
    """A layer of a user that holds a plain one."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(24, name="own_inner")

    def call(self, inputs):
        return self.dense(inputs)


@contextlib.contextmanager
def absl_warnings():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("layer", [_Product(name="own"), _Wrapper(name="own")])
def test_weights_that_keep_8_bits_are_named(layer):
    """Weights that are in no plain layer are right in the file, and no one is left to believe that they have 4 bits."""
    plain = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.Flatten()]
    model = plain_model(*plain, layer)
    images = random_images(8, (6, 6, 4))
    for bits in (8, 4):
        quantized = ptq.quantize(model, weight_bits=bits, per_channel=True, calibration=images)
        notes = [f"layers that keep weights of 8 bits: {layer.name} ({type(layer).__name__})"] if bits == 4 else []
        assert list(quantized.quantization_notes) == notes
        for make in (
            lambda: tflite.convert(quantized),  # noqa: B023
            lambda: tflite.convert(model, images, weight_bits=bits),  # noqa: B023
        ):
            with absl_warnings() as warnings:
                file = make()
            assert any("weights that keep 8 bits" in warning and layer.name in warning for warning in warnings) == (
                bits == 4
            )
            conv, other = tflite.weight_codes(file)
            assert np.max(np.abs(conv.codes)) == 2 ** (bits - 1) - 1 and np.max(np.abs(other.codes)) == 127
            outputs, expected = tflite.predict(file, images), model(images).numpy()
            assert np.max(np.abs(outputs - expected)) < (0.05 if bits == 8 else 0.5) * np.max(np.abs(expected))
        assert next(entry.layer for entry in tflite.layers(file, model, images)) == "conv"


def test_a_model_without_layers_to_quantize():
    model = keras.Sequential([keras.Input((4,)), _Product(name="own")], name="tiny")
    with pytest.raises(ValueError, match=r"'tiny' has no Conv2D, Conv2DTranspose, .* or Dense layer of its own"):
        ptq.quantize(model, calibration=random_images(4, (4,)))
    assert tflite.convert(model, random_images(4, (4,)))
