"""LSQ: gradients by the paper's equations, exact codes in the file, saving and loading."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.networks import (
    assert_file_computes_the_model,
    fit,
    model_of_all_weighted_layers,
    random_images,
    small_repvgg,
)

from tf_repvgg import tflite
from tf_repvgg.quantization import QuantizedLayer, learned_step_quantize, ptq, strip_learned_step
from tf_repvgg.quantization.qat.lsq import LearnedStep, code_range


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


def make_dense(weights, bits):
    layer = LearnedStep(keras.layers.Dense(1, use_bias=False, name="dense"), bits)
    layer.build((None, len(weights)))
    layer.layer.set_weights([np.float32(weights)[:, np.newaxis]])
    return layer


def test_gradients_by_the_paper():
    """Equation 3: the code of a weight outside the range; the rounding error of a weight inside."""
    layer = make_dense([-5.0, -0.3, 0.26, 0.6, 9.0], 3)
    layer.step.assign([0.5])
    with tf.GradientTape() as tape:
        weights = layer.quantize_kernel()
        total = tf.reduce_sum(weights * [[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    np.testing.assert_allclose(weights[:, 0], [-2.0, -0.5, 0.5, 0.5, 1.5])
    to_kernel, to_step = tape.gradient(total, [layer.layer.kernel, layer.step])
    np.testing.assert_array_equal(to_kernel[:, 0], [0, 10, 100, 1000, 0])
    expected = -4 + 10 * (-1 + 0.6) + 100 * (1 - 0.52) + 1000 * (1 - 1.2) + 10000 * 3
    np.testing.assert_allclose(to_step, [expected / np.sqrt(5 * 3)], rtol=1e-5)


@pytest.mark.parametrize("bits, expected", [(2, (-2, 1)), (4, (-8, 7)), (8, (-127, 127))])
def test_code_range(bits, expected):
    assert code_range(bits) == expected


@pytest.mark.parametrize("bits, per_channel", [(2, True), (3, False), (8, False)])
def test_from_training_to_the_file(model, bits, per_channel, tmp_path):
    fit(learned_step_quantize(model, bits, per_channel)).save(tmp_path / "m.keras")
    trained = fit(keras.models.load_model(tmp_path / "m.keras", compile=False), epochs=1)
    stripped = strip_learned_step(trained)
    np.testing.assert_array_equal(stripped(random_images()), trained(random_images()))
    file = tflite.convert(stripped)
    lowest, largest = code_range(bits)
    for name, in_file in zip(("first", "second", "logits"), tflite.weight_codes(file), strict=True):
        in_model = stripped.get_layer(name).get_quantized_kernel()
        np.testing.assert_array_equal(in_file.codes, in_model.codes)
        assert lowest <= in_model.codes.min() and in_model.codes.max() <= largest
        assert len(in_file.scale) == (in_model.codes.shape[-1] if per_channel else 1)
    if bits < 8:  # at 8 bits, the initial step leaves the outermost codes unused
        assert np.min([kernel.codes.min() for kernel in tflite.weight_codes(file)]) == lowest
    assert_file_computes_the_model(stripped, file, random_images(8, seed=1))


def test_steps_train(model):
    trained = learned_step_quantize(model, 3, calibration=random_images())
    before = [layer.step.numpy() for layer in trained.layers if isinstance(layer, LearnedStep)]
    fit(trained, learning_rate=0.05)
    after = [layer.step.numpy() for layer in trained.layers if isinstance(layer, LearnedStep)]
    assert all(np.any(step != trained_step) for step, trained_step in zip(before, after, strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
def test_training_starts_from_post_training_quantization(per_channel):
    """With the same codes and scales."""
    model = model_of_all_weighted_layers()
    batch = random_images(8, (8, 8, 3))
    quantized = ptq.quantize(model, "adaquant", 3, per_channel, batch, iterations=20)
    layers = [layer for layer in quantized.layers if isinstance(layer, QuantizedLayer)]
    steps = {layer.name: layer.scale.numpy() for layer in layers}
    trained = learned_step_quantize(ptq.dequantize(model, quantized), 3, per_channel, steps=steps, calibration=batch)
    stripped = strip_learned_step(trained)
    for layer in layers:
        kernel = stripped.get_layer(layer.name).get_quantized_kernel()
        np.testing.assert_array_equal(kernel.codes, layer.get_quantized_kernel().codes)
        np.testing.assert_array_equal(kernel.scale, layer.scale)


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_kind_of_layer(per_channel):
    model = model_of_all_weighted_layers()
    batch = random_images(8, (8, 8, 3))
    trained = learned_step_quantize(model, "dense=8,.*=6", per_channel, calibration=batch)
    assert np.max(np.abs(trained(batch) - model(batch))) < 0.1
    stripped = strip_learned_step(trained)
    np.testing.assert_allclose(stripped(batch), trained(batch), atol=1e-6)
    assert len(tflite.weight_codes(tflite.convert(stripped))) == 3


def test_bad_input(model):
    with pytest.raises(ValueError, match="weight bits are 9; they must be a whole number from 2 to 8"):
        learned_step_quantize(model, 9)
    local = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.LocallyConnected2D(2, 3, name="local")])
    with pytest.raises(ValueError, match="'local' is a LocallyConnected2D, whose weights cannot be trained with quant"):
        learned_step_quantize(local, 4)
    with pytest.raises(ValueError, match=r"first step of layer 'second' is \[1. 2.\]; it must be .* of shape \(1,\)"):
        learned_step_quantize(model, 4, steps={"second": [1, 2]})
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"first step of layer 'second' is .* above 0"):
            learned_step_quantize(model, 4, steps={"second": [bad]})
    with pytest.raises(ValueError, match="steps: 'secnd' is no layer with weights; there are first, second, logits"):
        learned_step_quantize(model, 4, steps={"secnd": [1.0]})
    with pytest.raises(ValueError, match="holds nothing that strip_learned_step strips"):
        strip_learned_step(model)
    broken = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="broken")])
    broken.get_layer("broken").set_weights([np.full([3, 2], np.nan), np.zeros(2)])
    with pytest.raises(ValueError, match="'broken' holds infinities or NaN"):
        learned_step_quantize(broken, 4)
