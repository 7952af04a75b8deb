"""Calibration data in every usual form and on the scale that the model takes; several inputs; batches of one."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.networks import random_images

from tf_repvgg import graph, tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import (
    cluster_quantize,
    learned_step_quantize,
    ptq,
    strip_cluster_quantize,
    strip_learned_step,
)
from tf_repvgg.quantization.samples import read_samples, stack_samples

SIZE = (8, 8, 3)
IMAGES = random_images(6, SIZE)
KINDS = np.arange(6) % 4
PIXELS = np.random.default_rng(0).integers(0, 256, (6, *SIZE)).astype(np.float32)
NORMALIZED = PIXELS / 127.5 - 1


def model_of(front=lambda inputs: inputs, dtype="float32"):
    inputs = keras.Input(SIZE, dtype=dtype, name="photo")
    return keras.Model(inputs, keras.layers.Conv2D(2, 3, name="stem")(front(inputs)))


def model_of_two_inputs(pack=list):
    """Its file uses the inputs in another order than the model has them."""
    image, kind = keras.Input(SIZE, name="photo"), keras.Input((), dtype="int32", name="kind")
    features = RepVGGBlock(4, strides=2, name="stem")(image)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    joined = keras.layers.Concatenate()([keras.layers.Embedding(4, 3, name="table")(kind), pooled])
    outputs = {
        "scores": {"first": keras.layers.Dense(3, name="first")(joined), "rest": [keras.layers.ReLU()(pooled)]},
        "size": keras.layers.Dense(1, name="size")(joined),
    }
    inputs = {"picture": image, "a_kind": kind} if pack is dict else [image, kind]
    return fuse(keras.Model(inputs, outputs))


def data_set(*parts):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0])


FORMS = {
    "an array": lambda: IMAGES,
    "a tensor": lambda: tf.constant(IMAGES),
    "a list": lambda: list(IMAGES),
    "numbers": lambda: IMAGES.tolist(),
    "a generator": lambda: (image for image in IMAGES),
    "batches of one": lambda: (image[None] for image in IMAGES),
    "TensorFlow's representative data": lambda: lambda: ([image[None]] for image in IMAGES),
    "a data set": lambda: data_set(IMAGES),
    "with labels": lambda: data_set(IMAGES, KINDS),
    "with labels, in batches": lambda: data_set(IMAGES, KINDS).batch(4),
    "with labels, in lists": lambda: [[image, 1] for image in IMAGES],
    "with labels and weights": lambda: [(IMAGES, KINDS, np.ones(6))],
    "pairs of images": lambda: data_set(IMAGES, -IMAGES),
    "by name": lambda: {"photo": IMAGES},
    "by name, with labels": lambda: data_set({"photo": IMAGES, "label": KINDS}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_images(form):
    samples = read_samples(FORMS[form](), model_of())
    assert {array.shape for (array,) in samples} == {(1, *SIZE)}
    (images,) = stack_samples(samples)
    np.testing.assert_array_equal(images, IMAGES)


def test_an_array_of_one_image():
    assert len(read_samples(IMAGES[0], model_of())) == 1


@pytest.mark.parametrize("pack", [list, dict])
def test_forms_of_several_inputs(pack):
    model = model_of_two_inputs(pack)
    named = {"picture": IMAGES, "a_kind": KINDS} if pack is dict else {"photo": IMAGES, "kind": KINDS}
    forms = [named, data_set(named), data_set(named, KINDS).batch(4)]
    if pack is list:
        forms += [[IMAGES, KINDS], zip(IMAGES, KINDS, strict=True), data_set((IMAGES, KINDS), KINDS)]
    for form in forms:
        by_rank = {array.ndim: array for array in stack_samples(read_samples(form, model))}
        np.testing.assert_array_equal(by_rank[4], IMAGES)
        np.testing.assert_array_equal(by_rank[1], KINDS)
        assert by_rank[1].dtype == np.int32


def assert_refuses(message, calibration, model=None):
    with pytest.raises(ValueError, match=message):
        read_samples(calibration, model or model_of())


def test_bad_forms():
    for nothing in (None, [], IMAGES[:0]):
        assert_refuses("there are no calibration images", nothing)
    assert_refuses("repeats without end", data_set(IMAGES).repeat())
    assert_refuses("has the keys 'image', but not 'photo'", {"image": IMAGES})
    assert_refuses(r"calibration image 0 has shape \(8, 8, 1\); the model's input is \(8, 8, 3\)", IMAGES[..., :1])
    assert_refuses(r"calibration image 6 has shape \(6,\)", (IMAGES, KINDS))
    assert_refuses("image 0 is a list of 2 arrays of shape .*; give an array", [[IMAGES[0], IMAGES[1]]])
    assert_refuses("calibration image 4 holds nan|infinities", np.where(np.arange(6) == 4, np.nan, IMAGES.T).T)
    assert_refuses("calibration is a int; it must be images", 5)
    assert_refuses("image 0 is a list that is no array", [[[1, 2], [3]]])
    assert_refuses("image 0 is a str that holds", "folder/of/images")
    assert_refuses(
        "holds 0.5; the model's input takes whole numbers from 0 to 255",
        [PIXELS[0], 0 * PIXELS[0] + 0.5],
        model_of(dtype="uint8", front=lambda x: tf.cast(x, "float32")),
    )
    two = model_of_two_inputs()
    assert_refuses("sample 0 is a single value; it must be a dictionary, or a tuple .* 'photo', 'kind'", IMAGES, two)
    assert_refuses("sample 0 of input 'kind' holds -0.5", [(IMAGES[0], -0.5)], two)
    assert_refuses("inputs have 6, 3 values each", [IMAGES, KINDS[:3]], two)
    assert_refuses("must be a dictionary of the model's inputs", [IMAGES, KINDS], model_of_two_inputs(dict))
    free = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match=r"differ in size: \(6, 8, 3\), \(8, 8, 3\)"):
        stack_samples(read_samples([IMAGES[0], IMAGES[1, :6]], free))


FRONTS = {
    "rescaling": keras.layers.Rescaling(1 / 127.5, -1.0),
    "normalization": keras.layers.Normalization(mean=[124, 116, 104], variance=[3400, 3300, 3300]),
    "operators": lambda inputs: inputs / 255.0,
    "augmentation": lambda inputs: keras.layers.Rescaling(1 / 255)(keras.layers.RandomBrightness(1.0)(inputs)),
    "nested": keras.Sequential([keras.Input(SIZE), keras.layers.Rescaling(1 / 255)]),
    "Keras's own": keras.applications.mobilenet_v2.preprocess_input,
}


@pytest.mark.parametrize("front", FRONTS)
def test_models_that_start_with_pixels(front):
    model = model_of(FRONTS[front])
    read_samples(PIXELS, model)
    read_samples(0 * PIXELS, model)
    assert_refuses("lie between -1 and 1, as normalized images do, but the model itself divides", NORMALIZED, model)


def test_training_continues_on_pixels():
    """After post-training quantization, which has the division of pixels in the first kernel."""
    model = model_of(FRONTS["operators"])
    start = ptq.dequantize(model, ptq.quantize(model, calibration=PIXELS))
    trained = strip_cluster_quantize(cluster_quantize(start, 256, calibration=PIXELS))
    expected = model(PIXELS)
    assert np.max(np.abs(trained(PIXELS) - expected)) < 0.05 * np.max(np.abs(expected))


def test_models_that_start_with_normalized_images():
    for front in (lambda inputs: inputs, keras.layers.ZeroPadding2D(), tf.image.per_image_standardization):
        read_samples(NORMALIZED, model_of(front))
    read_samples(NORMALIZED, model_of(keras.layers.AveragePooling2D(2)))
    read_samples(PIXELS - 120, model_of())  # means subtracted, as for VGG and ResNet
    assert_refuses("reach 255, as pixels do, and layer 'stem' takes them", PIXELS.astype(np.uint8), model_of())
    assert_refuses(r"reach .*e\+06", 1e6 * NORMALIZED, model_of())
    assert_refuses("layer 'stem' takes", PIXELS, model_of(keras.layers.ZeroPadding2D()))
    declared = model_of(keras.layers.Rescaling(1.0))
    actual = tflite.predict(tflite.convert(declared, PIXELS), PIXELS)
    assert np.max(np.abs(actual - declared(PIXELS))) < 0.03 * np.max(np.abs(actual))
    read_samples(PIXELS, model_of(lambda inputs: tf.cast(inputs, "float32"), dtype="uint8"))
    read_samples([1000.0 * np.ones(3)], keras.Sequential([keras.Input([3]), keras.layers.Dense(2)]))  # no images


@pytest.mark.parametrize("training_images", [PIXELS, NORMALIZED])
def test_a_model_trained_on_pixels(training_images):
    """The statistics of its normalizations say so."""
    inputs = keras.Input(SIZE)
    model = keras.Model(inputs, RepVGGBlock(4, name="stem")(inputs))
    for layer in graph.find_layers(model, keras.layers.BatchNormalization):
        layer.momentum = 0.0
    model(training_images, training=True)
    fused = fuse(model)
    read_samples(NORMALIZED, fused)
    if training_images is PIXELS:
        read_samples(PIXELS, fused)
    else:
        assert_refuses("as pixels do", PIXELS, fused)


@pytest.mark.parametrize("pack", [list, dict])
def test_files_of_several_inputs(pack):
    """On every way to a file; outputs of nested structures have their path as name."""
    model = model_of_two_inputs(pack)
    named = {"picture": IMAGES, "a_kind": KINDS} if pack is dict else {"photo": IMAGES, "kind": KINDS}
    feed = named if pack is dict else [IMAGES, KINDS]
    outputs = model(feed)
    expected = {
        "scores_first": outputs["scores"]["first"],
        "scores_rest_0": outputs["scores"]["rest"][0],
        "size": outputs["size"],
    }
    if pack is dict:
        models = [model, strip_cluster_quantize(cluster_quantize(model, 256, calibration=named))]
    else:
        tuned = ptq.quantize(model, "bias_tune", calibration=named, iterations=4)
        models = [tuned, strip_learned_step(learned_step_quantize(model, calibration=feed))]
    for quantized in models:
        file = tflite.convert(quantized, named if quantized is model else None)
        actual = tflite.predict(file, named)
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            assert np.max(np.abs(actual[name] - values)) < 0.12 * np.max(np.abs(values)), name
        if pack is list:
            in_order = tflite.predict(file, [IMAGES, KINDS])
            np.testing.assert_array_equal(in_order["size"], actual["size"])
    assert_predict_refuses(file, named)


def assert_predict_refuses(file, named):
    first, second = named
    with pytest.raises(ValueError, match=f"but not for {second!r}; the file's inputs are"):
        tflite.predict(file, {first: IMAGES})
    with pytest.raises(ValueError, match="the file has 2 inputs, "):
        tflite.predict(file, IMAGES)
    with pytest.raises(ValueError, match=r"have shape \(3,\); the file needs|needs \(3,"):
        tflite.predict(file, named | {second: KINDS[:3]})
    with pytest.raises(ValueError, match=r"takes whole numbers from .*, but got 0\.5"):
        tflite.predict(file, named | {second: KINDS + 0.5})


@pytest.mark.parametrize("batch", [1, 2])
def test_models_of_a_fixed_batch(batch):
    """The batch stays fixed where the model depends on it, and a file has a batch of one."""
    inputs = keras.Input(SIZE, batch_size=batch)
    features = RepVGGBlock(4, strides=2, name="stem")(inputs)
    dense = keras.layers.Dense(2, name="dense")
    free = fuse(keras.Model(inputs, dense(keras.layers.Flatten()(features))))
    assert free.input_shape == (None, *SIZE)
    fixed = fuse(keras.Model(inputs, dense(tf.reshape(features, [batch, 64]))))
    assert fixed.input_shape == (batch, *SIZE)
    if batch > 1:
        assert_refuses("computes batches of 2 only", IMAGES, fixed)
        return
    expected = free(IMAGES).numpy()
    clustered = cluster_quantize(fixed, 256, calibration=IMAGES)
    for quantized in (ptq.quantize(fixed, calibration=IMAGES), strip_cluster_quantize(clustered)):
        actual = tflite.predict(tflite.convert(quantized), IMAGES)
        assert np.max(np.abs(actual - expected)) < 0.05 * np.max(np.abs(expected))


def test_images_of_another_shape_than_the_file():
    file = tflite.convert(model_of(), IMAGES)
    with pytest.raises(ValueError, match=r"the images have shape \(6, 4, 8, 3\); the file needs \(6, 8, 8, 3\)"):
        tflite.predict(file, IMAGES[:, :4])
    np.testing.assert_array_equal(tflite.predict(file, {"photo": IMAGES}), tflite.predict(file, IMAGES))
