"""Integer files: conversion, metadata, and an interpreter that computes what they say."""

import collections
import json

import numpy as np
import pytest
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from helpers.integer_files import assert_computes_what_it_says, make_repvgg_with_biases, plain_layers, read_tensors
from helpers.networks import SIZE, random_images
from helpers.random_weights import randomize

from tf_repvgg import tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import ptq, quantize_min_max
from tf_repvgg.tflite import METADATA_NAME, flatbuffer


@pytest.fixture(scope="module")
def fused():
    keras.utils.set_random_seed(0)
    return make_repvgg_with_biases()


@pytest.fixture(scope="module")
def file(fused):
    return tflite.convert(fused, random_images())


@pytest.mark.parametrize("inference_type", ["int8", "uint8", "float32"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_interpreter_computes_what_the_file_says(inference_type, padding):
    model = make_repvgg_with_biases(padding)
    file = tflite.convert(model, random_images(), inference_type=inference_type)
    images = random_images(8, seed=1)
    assert_computes_what_it_says(file, images)
    # 8-bit activations and weights stay close to float; a wrong scale in any layer would not.
    expected = model(images).numpy()
    computed = tflite.predict(file, images)
    assert computed.dtype == np.float32
    assert np.max(np.abs(computed - expected)) < 0.08 * np.max(np.abs(expected))
    interpreter, _ = read_tensors(file)
    kinds = {"int8": np.int8, "uint8": np.uint8, "float32": np.float32}
    (input_details,), (output_details,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert input_details["dtype"] == output_details["dtype"] == kinds[inference_type]
    assert tuple(input_details["shape"]) == (1, *SIZE)
    expected_operators = collections.Counter({"CONV_2D": 2, "MEAN": 1, "FULLY_CONNECTED": 1})
    expected_operators["PAD"] += padding == "symmetric"
    expected_operators["QUANTIZE"] += {"int8": 0, "uint8": 2, "float32": 1}[inference_type]
    expected_operators["DEQUANTIZE"] += inference_type == "float32"
    assert collections.Counter(op.name for op in tflite.operators(file)) == +expected_operators


def test_all_tensors_are_integers(file):
    _, tensors = read_tensors(file)
    kinds = {np.dtype(tensor["dtype"]) for tensor in tensors.values()}
    assert kinds <= {np.dtype(np.int8), np.dtype(np.int32)}


def test_a0_at_224_is_22_convolutions_a_mean_and_a_dense_layer():
    model = fuse(
        build_repvgg("A0", (224, 224, 3), 1000, norm="oabn"), check_inputs=np.zeros((1, 224, 224, 3), "float32")
    )
    file = tflite.convert(model, random_images(2, (224, 224, 3)))
    assert [op.name for op in tflite.operators(file)] == ["CONV_2D"] * 22 + ["MEAN", "FULLY_CONNECTED"]
    assert tflite.operators(file)[0].output_shape == (1, 112, 112, 48)
    assert tflite.operators(file)[-1].output_shape == (1, 1000)
    for layer, kernel in zip(plain_layers(model), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(kernel.codes, quantize_min_max(layer.kernel.numpy()).codes)
    assert model.count_params() < len(file) < 1.1 * model.count_params()


def test_symmetric_padding_costs_a_pad_for_each_strided_block_of_a0():
    model = fuse(build_repvgg("A0", (64, 64, 3), 10, padding="symmetric"))
    counts = collections.Counter(
        op.name for op in tflite.operators(tflite.convert(model, random_images(2, (64, 64, 3))))
    )
    assert counts == {"PAD": 5, "CONV_2D": 22, "MEAN": 1, "FULLY_CONNECTED": 1}


def test_any_image_size_becomes_that_of_the_calibration_images():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(RepVGGBlock(4)(inputs)))
    randomize(model)
    fused = fuse(model)
    file = tflite.convert(fused, random_images(4))
    assert tflite.operators(file)[0].output_shape == (1, 12, 11, 4)
    assert_computes_what_it_says(file, random_images(4))
    with pytest.raises(ValueError, match=r"image_size is \(8, 9\), but the calibration images are \(12, 11, 3\)"):
        tflite.convert(fused, random_images(4), image_size=(8, 9))
    quantized = ptq.quantize(fused, calibration=random_images(4))
    assert tflite.operators(tflite.convert(quantized, image_size=(8, 9)))[0].output_shape == (1, 8, 9, 4)
    with pytest.raises(
        ValueError, match=r"input '.*' is \(None, None, 3\); a file needs a fixed size: give image_size="
    ):
        tflite.convert(quantized)


def test_metadata_is_in_the_file(fused, file):
    metadata = {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 128.0}
    with_metadata = tflite.convert(fused, random_images(2), metadata=metadata)
    for content in (with_metadata, tflite.with_weights(file, fused, metadata=metadata)):
        flat = schema.ModelT.InitFromPackedBuf(content, 0)
        entries = {entry.name: bytes(flat.buffers[entry.buffer].data) for entry in flat.metadata}
        assert json.loads(entries[METADATA_NAME.encode()]) == metadata
        assert METADATA_NAME == "TF_REPVGG_INPUT"
    # The interpreter does not mind.
    images = random_images(2)
    assert tflite.predict(with_metadata, images).shape == (2, 5)


def test_metadata_written_again_replaces_the_old(fused):
    first = tflite.convert(fused, random_images(2), metadata={"dataset": "old"})
    flat = schema.ModelT.InitFromPackedBuf(tflite.with_weights(first, fused, 4, metadata={"dataset": "new"}), 0)
    entries = [entry for entry in flat.metadata if entry.name == METADATA_NAME.encode()]
    assert [json.loads(bytes(flat.buffers[entry.buffer].data)) for entry in entries] == [{"dataset": "new"}]


def test_constants_are_aligned(fused, file):
    """Data start at multiples of 16 bytes, as the format demands of files that are read in place."""
    for content in (file, tflite.with_weights(file, fused, 4, metadata={"dataset": "digits"})):
        model = schema.Model.GetRootAs(content, 0)
        starts = []
        for index in range(model.BuffersLength()):
            buffer = model.Buffers(index)
            if buffer.DataLength():
                offset = buffer._tab.Vector(buffer._tab.Offset(4))
                starts.append(offset)
                assert content[offset : offset + buffer.DataLength()] == buffer.DataAsNumpy().tobytes()
        assert len(starts) >= 6
        assert all(start % 16 == 0 for start in starts)


def constants_moved_behind(file):
    """The same file with its constants behind the flatbuffer, as those of large models are."""
    flat = flatbuffer.unpack(file)
    moved = [buffer for buffer in flat.buffers if buffer.data is not None and len(buffer.data)]
    contents = [np.asarray(buffer.data, np.uint8).tobytes() for buffer in moved]
    for buffer, content in zip(moved, contents, strict=True):
        buffer.data, buffer.offset, buffer.size = None, 2, len(content)
    end = len(flatbuffer.pack(flat))  # the numbers themselves take the same bytes whatever they are
    behind = b""
    for buffer, content in zip(moved, contents, strict=True):
        behind += bytes(-(end + len(behind)) % 16)
        buffer.offset = end + len(behind)
        behind += content
    return flatbuffer.pack(flat) + behind


def test_constants_behind_the_flatbuffer(file):
    moved = constants_moved_behind(file)
    assert all(buffer.data is None for buffer in schema.ModelT.InitFromPackedBuf(moved, 0).buffers)
    images = random_images(4, seed=1)
    expected = tflite.predict(file, images)
    np.testing.assert_array_equal(tflite.predict(moved, images), expected)
    rewritten = flatbuffer.pack(flatbuffer.unpack(moved))
    np.testing.assert_array_equal(tflite.predict(rewritten, images), expected)
    with pytest.raises(ValueError, match="a constant ends at byte"):
        flatbuffer.unpack(moved[:-8])


def test_bad_arguments(fused, file):
    with pytest.raises(ValueError, match="inference_type is 'int4'; known for activations of 8 bits: int8, uint8"):
        tflite.convert(fused, random_images(), inference_type="int4")
    with pytest.raises(ValueError, match="no calibration images; activation ranges need at least one"):
        tflite.convert(fused, [])
    with pytest.raises(ValueError, match=r"calibration image 1 has shape \(12, 12, 3\); the model's input is"):
        tflite.convert(fused, [np.zeros(SIZE), np.zeros((12, 12, 3))])
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="calibration image 0 holds infinities or NaN"):
            tflite.convert(fused, [np.full(SIZE, value)])
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"weight bits are {bits}; they must be a whole number from 2 to 8"):
            tflite.with_weights(file, fused, bits)


def test_training_form_is_refused():
    inputs = keras.Input(SIZE)
    model = keras.Model(inputs, RepVGGBlock(4, name="stem")(inputs))
    with pytest.raises(ValueError, match=r"block 'stem' is still in training form; call tf_repvgg.fusion.fuse"):
        tflite.convert(model, random_images())
    nested = keras.Sequential([keras.Input(SIZE), model])
    with pytest.raises(ValueError, match="block 'stem' is still in training form"):
        tflite.convert(nested, random_images())


def test_predict_with_fewer_images_than_cores_and_with_none(file, fused):
    images = random_images(3)
    together = tflite.predict(file, images)
    np.testing.assert_array_equal(together[1:2], tflite.predict(file, images[1:2]))
    assert tflite.predict(file, images[:0]).shape == (0, 5)


def test_latency(file):
    latency = tflite.latency(file, threads=2, runs=50)
    assert 0 < latency.p50_ms <= latency.p90_ms < 1000
    assert (latency.runs, latency.threads) == (50, 2)


def test_trained_digits_keep_their_accuracy(trained_digits, fused_digits, digits_file, digits, digits_test_split):
    images, labels = digits_test_split
    float_classes = trained_digits(images).numpy().argmax(axis=1)
    np.testing.assert_allclose(fused_digits(images), trained_digits(images), atol=1e-3)
    classes = tflite.predict(digits_file, images).argmax(axis=1)
    float_top1, top1 = 100 * np.mean(float_classes == labels), 100 * np.mean(classes == labels)
    assert float_top1 > 85
    assert top1 > float_top1 - 3
    assert np.mean(classes == float_classes) > 0.97
    assert_computes_what_it_says(digits_file, images[:20])


def test_int8_input_is_the_pixel_minus_128(digits_file, digits):
    """Scale 1/128 and zero point 0, as `Preprocessing` promises to whoever feeds the file from a camera."""
    interpreter, _ = read_tensors(digits_file)
    (details,) = interpreter.get_input_details()
    assert details["quantization"] == (1 / 128, 0)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_squeeze_excite_survives(per_channel):
    inputs = keras.Input(SIZE)
    features = RepVGGBlock(8, strides=2, se_reduction=2, padding="symmetric", name="first")(inputs)
    features = QARepVGGBlock(8, groups=4, se_reduction=4, name="second")(features)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(pooled))
    randomize(model, dead_share=0)
    fused = fuse(model)
    images = random_images(8)
    file = tflite.convert(fused, images, per_channel=per_channel)
    squeeze_excite = {"MEAN": 1, "CONV_2D": 2, "LOGISTIC": 1, "MUL": 1}
    expected_operators = collections.Counter({"PAD": 1, "CONV_2D": 2, "MEAN": 1, "FULLY_CONNECTED": 1})
    expected_operators.update({name: 2 * count for name, count in squeeze_excite.items()})
    assert collections.Counter(operator.name for operator in tflite.operators(file)) == expected_operators
    for bits in (8, 4):
        kernels = tflite.weight_codes(tflite.with_weights(file, fused, bits, per_channel))
        for layer, weights in zip(plain_layers(fused), kernels, strict=True):
            expected = quantize_min_max(layer.kernel.numpy(), bits, per_channel)
            np.testing.assert_array_equal(weights.codes, expected.codes)
            np.testing.assert_array_equal(weights.scale, expected.scale)
    assert_computes_what_it_says(file, images)
    expected = fused(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.08 * np.max(np.abs(expected))


@pytest.mark.parametrize("names", [("last", "first"), ("output_0", "output_1")])
def test_several_outputs_have_the_names_of_the_model(names):
    inputs = keras.Input((6, 6, 4))
    features = keras.layers.Conv2D(4, 3)(inputs)
    outputs = [keras.layers.Conv2D(2, 1, name="z")(features), keras.layers.Conv2D(3, 1, name="a")(features)]
    model = keras.Model(inputs, outputs if "output_0" in names else dict(zip(names, outputs, strict=True)))
    images = random_images(4, (6, 6, 4))
    computed = tflite.predict(tflite.convert(model, images), images)
    expected = dict(zip(names, keras.Model(inputs, outputs)(images), strict=True))
    assert computed.keys() == expected.keys()
    for name in names:
        np.testing.assert_allclose(computed[name], expected[name], atol=0.05 * np.max(np.abs(expected[name])))
