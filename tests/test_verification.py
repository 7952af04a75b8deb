"""A file that computes something else than its model is refused; constants that users write are in the file."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import converter, tflite
from tf_repvgg.quantization import ptq
from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.weights import with_weights

SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, *SHAPE)).astype(np.float32)


def make_model(tail=lambda features: features):
    inputs = keras.Input(SHAPE)
    features = tail(keras.layers.Conv2D(4, 3, name="first", bias_initializer="ones")(inputs))
    features = keras.layers.Conv2D(4, 3, name="second", activation="relu")(features)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(keras.layers.GlobalAveragePooling2D()(features)))


def change_operator(file, layer_name, change):
    """A copy of a file, after `change(flat, subgraph, operator)` of the operator of a layer."""
    flat = flatbuffer.unpack(file)
    (subgraph,) = flat.subgraphs
    for operator in subgraph.operators:
        has_weights = flatbuffer.weights_layout(flat, operator) is not None
        if has_weights and flatbuffer.weights_layer_name(flatbuffer.weights_tensor(subgraph, operator)) == layer_name:
            change(flat, subgraph, operator)
    return flatbuffer.pack(flat)


def lose_bias(flat, subgraph, operator):
    tensor = flatbuffer.bias_tensor(flat, subgraph, operator)
    flatbuffer.set_constant(flat, tensor, np.zeros(4, np.int32), tensor.quantization.scale)


def turn_kernel(flat, subgraph, operator):
    tensor, layout = flatbuffer.weights_tensor(subgraph, operator), flatbuffer.weights_layout(flat, operator)
    codes = flatbuffer.weight_codes(flat, tensor, layout)
    flatbuffer.set_weights(flat, tensor, layout, codes[::-1], tensor.quantization.scale)


@pytest.mark.parametrize("change", [lose_bias, turn_kernel])
@pytest.mark.parametrize("layer_name", ["first", "second"])
def test_the_first_layer_that_departs_is_named(change, layer_name):
    quantized = ptq.quantize(make_model(), calibration=IMAGES)
    quantized.get_layer(layer_name).bias.assign([0.5, 1.0, -0.5, 2.0])
    file, samples = tflite.convert(quantized), tflite.make_samples(quantized, [SHAPE])
    tflite.verify(file, quantized, samples)
    with pytest.raises(tflite.WrongFileError, match=rf"departs from the model at layer '{layer_name}': its tensor '"):
        tflite.verify(change_operator(file, layer_name, change), quantized, samples)


def test_a_constant_that_the_converter_folds_into_a_bias_stays():
    """As TensorFlow's own converter makes files of float models, from which `with_weights` takes the bias."""
    model = make_model(lambda features: features + 3.0)
    samples = [[image[np.newaxis]] for image in IMAGES]
    file = converter.run(converter.make_calibrating_converter(model, samples, tf.int8))
    assert "ADD" not in [operator.name for operator in tflite.operators(file)]  # it is folded
    outputs, expected = tflite.predict(with_weights(file, model), IMAGES), model.predict_on_batch(IMAGES)
    assert np.max(np.abs(outputs - expected)) < 0.05 * np.ptp(expected)


def test_inputs_with_names_that_files_do_not_take():
    """As the converter writes them: 'right_image', 'main_features'."""
    inputs = [keras.Input(SHAPE, name="right-image"), keras.Input((4,), name="main/features")]
    features = [keras.layers.GlobalAveragePooling2D()(inputs[0]), keras.layers.Dense(3)(inputs[1])]
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Concatenate()(features)))
    arrays = [IMAGES, IMAGES[:, 0, :4, 0]]
    outputs, expected = tflite.predict(tflite.convert(model, arrays), arrays), model.predict_on_batch(arrays)
    assert np.max(np.abs(outputs - expected)) < 0.05 * np.ptp(expected)


class Gate(keras.layers.Layer):
    """A user's own layer, which cannot be copied, with layers, a constant and an operation without a quantizer inside.

    Args:
      limit: Constant that is added.
    """

    def __init__(self, limit):
        super().__init__()
        self.limit, self.squeeze = limit, keras.layers.Conv2D(4, 1, name="squeeze")

    def call(self, inputs):
        return inputs * tf.sigmoid(self.squeeze(inputs) + self.limit)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_inside_of_a_layer(bits):
    model = make_model(Gate(2.0))
    file = tflite.convert(model, IMAGES, weight_bits=bits)
    assert sorted(int(np.max(np.abs(kernel.codes))) for kernel in tflite.weight_codes(file)) == 4 * [
        2 ** (bits - 1) - 1
    ]
    outputs, expected = tflite.predict(file, IMAGES), model.predict_on_batch(IMAGES)
    assert np.max(np.abs(outputs - expected)) < (0.05 if bits == 8 else 0.5) * np.ptp(expected)


def test_outputs_that_tensorflows_kernels_do_not_compute_are_refused(monkeypatch):
    """Without quantizers, only whole outputs can be compared: here those of a file of another model."""
    model, other = make_model(Gate(2.0)), make_model(Gate(-2.0))
    other.get_layer("logits").bias.assign([5.0, -5.0, 0.0])
    make = converter.make_calibrating_converter
    monkeypatch.setattr(converter, "make_calibrating_converter", lambda _, *arguments: make(other, *arguments))
    with pytest.raises(tflite.WrongFileError, match=r"an output differs by .* % of its standard deviation"):
        tflite.convert(model, IMAGES)


def test_constants_beside_an_operation_that_no_grid_follows():
    """A ReLU with a threshold is left to TensorFlow's converter, which multiplies constants into kernels."""
    image = keras.Input(IMAGES.shape[1:])
    features = keras.layers.Conv2D(4, 3)(keras.layers.ReLU(threshold=0.3)(image)) * 1.7
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(features) * [0.5, -1.0, 2.0, 3.0] + 1.0)
    expected = model.predict_on_batch(IMAGES)
    assert np.max(np.abs(tflite.predict(tflite.convert(model, IMAGES), IMAGES) - expected)) < 0.05 * np.ptp(expected)


@pytest.mark.parametrize(
    "recurrent", [keras.layers.GRU(4, name="loop"), keras.layers.Bidirectional(keras.layers.LSTM(2, name="loop"))]
)
def test_recurrent_layers_are_refused(recurrent):
    """TensorFlow's converter crashes on some of them."""
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, keras.layers.Dense(3)(recurrent(inputs)))
    for quantize in (tflite.convert, lambda model, images: ptq.quantize(model, calibration=images)):
        with pytest.raises(ValueError, match=r"layer '.*loop' is a (GRU|LSTM), and integer files of recurrent layers"):
            quantize(model, np.zeros((2, 6, 4), np.float32))


def test_divisors_that_round_to_zero_are_named():
    """LiteRT stops at a division by the code of zero; here 1 + |x| spans a thousand times its smallest value."""
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(3)(keras.layers.Conv2D(4, 3, activation="softsign")(inputs))
    model = keras.Model(inputs, outputs)
    model.layers[1].kernel.assign(1000 * model.layers[1].kernel)
    with pytest.raises(tflite.WrongFileError, match="a divisor rounds to zero on its grid"):
        tflite.convert(model, IMAGES)
