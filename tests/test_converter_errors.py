"""What TensorFlow's converter or LiteRT refuses: one line that names the operation and what to use instead."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import tflite
from tf_repvgg.converter_errors import explain_conversion, explain_run
from tf_repvgg.quantization import ptq


@pytest.mark.parametrize(
    "function, bits, message",
    [
        (lambda x: tf.math.erf(x), 8, "TFLite has no operation Erf; use .*tanh instead"),
        (lambda x: tf.linalg.inv(x + tf.eye(4)), 8, "TFLite has no operation MatrixInverse; use .* instead"),
        (
            lambda x: tf.cast(2 * tf.cast(x, tf.float64), tf.float32),
            8,
            r"refuses the operation \w+ \('.*'\); use another",
        ),
        (lambda x: keras.activations.gelu(x, approximate=True), 16, "TFLite's GELU has no form .*; use swish or ReLU"),
        (lambda x: tf.math.l2_normalize(x, -1), 16, "the operation L2_NORMALIZATION .*, or 8-bit activations"),
    ],
)
def test_refused_before_quantization(function, bits, message, capfd):
    layers = [keras.layers.Dense(4), keras.layers.Lambda(function)]
    model = keras.Sequential([keras.Input((4, 4)), *layers])
    with pytest.raises(ValueError, match=message) as caught:
        ptq.quantize(model, calibration=np.ones([1, 4, 4]), activation_bits=bits)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "error" not in capfd.readouterr().err  # nor the converter's pages


def test_refused_as_a_float_file():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: tf.math.erf(x))])
    with pytest.raises(ValueError, match="TFLite has no operation Erf"):
        tflite.convert_float(model)


def test_operations_whose_trial_needs_mending_are_not_refused():
    """The converter gives a depthwise convolution beside int16 activations a bias that LiteRT loads only after it is
    written anew.
    """
    layers = [keras.layers.DepthwiseConv2D(3), keras.layers.LeakyReLU()]
    model = keras.Sequential([keras.Input((4, 4, 2)), *layers])
    quantized = ptq.quantize(model, calibration=np.ones([1, 4, 4, 2]), activation_bits=16)
    assert tflite.convert(quantized)


def test_errors_of_unknown_form():
    assert explain_conversion(RuntimeError("a.cc:3 first\nsecond")).startswith(
        "TensorFlow's converter cannot write the model: first second; use plain layers"
    )
    assert len(explain_conversion(RuntimeError("long " * 1000))) < 400
    assert explain_conversion(RuntimeError("Quantization to 16x8-bit not yet supported for op: 'NEW'."), 16) == (
        "TFLite's NEW has no form with 16-bit activations; use another operation instead, or 8-bit activations"
    )
    assert "operation MatrixInverse, which LiteRT does not have" in explain_run(
        "Select TensorFlow op(s) are not supported.Node number 0 (FlexMatrixInverse) failed to prepare."
    )
    assert explain_run("no such file") == "LiteRT cannot run the file: no such file"
