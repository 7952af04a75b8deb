"""Integer files: exact codes, exact biases, and an interpreter that computes what they mean."""

import collections
import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from helpers.random_weights import randomize

from tf_repvgg import tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import QuantizedKernel, quantize_min_max
from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.convert import METADATA_NAME

SIZE = (12, 11, 3)


def calibration(count=16, size=SIZE, seed=0):
    return list(np.random.default_rng(seed).uniform(-1, 1, (count, *size)).astype("float32"))


def two_block_model(padding="same", classes=5):
    inputs = keras.Input(SIZE)
    features = RepVGGBlock(8, strides=2, padding=padding, name="first")(inputs)
    features = QARepVGGBlock(8, name="second")(features)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(classes, name="logits")(features))
    randomize(model)
    model.get_layer("logits").bias.assign(np.linspace(-1, 1, classes))
    return fuse(model)


@pytest.fixture(scope="module")
def fused():
    keras.utils.set_random_seed(0)
    return two_block_model()


@pytest.fixture(scope="module")
def file(fused):
    return tflite.convert(fused, calibration())


def weighted_layers(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)]


def details_of(file):
    """{tensor index: (array or None, scales, zero point)} and the operators, read by the interpreter alone."""
    interpreter = Interpreter(model_content=file)
    interpreter.allocate_tensors()
    return interpreter, {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}


def bias_codes(file):
    """[(codes, scales)] of the biases of all operators with weights, in execution order."""
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    found = []
    for operator in graph.operators:
        if flatbuffer.weights_layout(flat, operator) is not None:
            if len(operator.inputs) < 3 or operator.inputs[2] < 0:
                continue  # the converter leaves out biases of zero
            tensor = graph.tensors[operator.inputs[2]]
            assert tensor.type == schema.TensorType.INT32
            input_scale = graph.tensors[operator.inputs[0]].quantization.scale[0]
            found.append((flatbuffer.constant(flat, tensor, np.int32), tensor.quantization.scale, input_scale))
    return found


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_file_holds_exactly_the_codes(fused, file, bits, per_channel):
    rewritten = tflite.with_weights(file, fused, bits, per_channel)
    layers = weighted_layers(fused)
    codes, biases = tflite.weight_codes(rewritten), bias_codes(rewritten)
    assert len(codes) == len(biases) == len(layers) == 3
    for layer, found, (bias, bias_scale, input_scale) in zip(layers, codes, biases, strict=True):
        expected = quantize_min_max(layer.kernel.numpy(), bits, per_channel)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scale, expected.scale)
        assert np.max(np.abs(found.codes.astype(int))) == 2 ** (bits - 1) - 1
        np.testing.assert_allclose(bias_scale, np.float64(input_scale) * expected.scale, rtol=1e-6)
        assert np.all(np.abs(bias - layer.bias.numpy() / np.float64(bias_scale)) <= 0.5 + 1e-3)
    # And the interpreter reads the same: int8 weights, the scales, zero points of zero.
    interpreter, tensors = details_of(rewritten)
    first = next(t for t in tensors.values() if tuple(t["shape"]) == (8, 3, 3, 3))
    assert first["dtype"] == np.int8
    np.testing.assert_array_equal(np.moveaxis(interpreter.get_tensor(first["index"]), 0, -1), codes[0].codes)
    parameters = first["quantization_parameters"]
    np.testing.assert_array_equal(parameters["scales"], codes[0].scale)
    assert np.all(parameters["zero_points"] == 0)
    assert len(parameters["scales"]) == (8 if per_channel else 1)


def test_given_codes_are_written_as_they_are(fused, file):
    """Any codes a method chooses, a codebook's for instance, per tensor or per channel, Dense included."""
    generator = np.random.default_rng(0)
    kernels = {
        "second": QuantizedKernel(
            generator.choice([-90, -3, 0, 8, 127], (3, 3, 8, 8)).astype(np.int8), np.float32([0.01])
        ),
        "logits": QuantizedKernel(
            generator.integers(-7, 8, (8, 5)).astype(np.int8), generator.uniform(0.01, 0.1, 5).astype(np.float32)
        ),
    }
    for rewritten in (
        tflite.with_weights(file, fused, kernels=kernels),
        tflite.convert(fused, calibration(), kernels=kernels),
    ):
        first, second, logits = tflite.weight_codes(rewritten)
        for found, expected in ((second, kernels["second"]), (logits, kernels["logits"])):
            np.testing.assert_array_equal(found.codes, expected.codes)
            np.testing.assert_array_equal(found.scale, expected.scale)
        np.testing.assert_array_equal(first.codes, quantize_min_max(fused.get_layer("first").kernel.numpy()).codes)
        images = np.stack(calibration(4))
        assert_computes_what_it_says(rewritten, images)


def test_codes_for_unknown_layers_are_refused(fused, file):
    """A misspelt name must not leave the layer silently rounded by min-max."""
    kernels = {"secnd": quantize_min_max(fused.get_layer("second").kernel.numpy(), 4)}
    with pytest.raises(ValueError, match="secnd"):
        tflite.with_weights(file, fused, kernels=kernels)


def test_codes_of_another_shape_are_refused(fused, file):
    kernels = {"second": quantize_min_max(fused.get_layer("first").kernel.numpy(), 4)}
    with pytest.raises(ValueError, match="second"):
        tflite.with_weights(file, fused, kernels=kernels)


def simulate(file, image):
    """The file in real numbers, rounded to each activation's grid: what its scales and zero points say it computes.

    Every operator is computed in double precision from dequantized codes, and its output put on the grid stated for
    that tensor, so a wrong scale, zero point, bias or weight anywhere shows at the end.
    """
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    real = {}

    def on_grid(index, values):
        quantization, kind = graph.tensors[index].quantization, graph.tensors[index].type
        limits = {schema.TensorType.INT8: np.iinfo(np.int8), schema.TensorType.UINT8: np.iinfo(np.uint8)}
        if kind not in limits:
            return values
        scale, zero_point = float(quantization.scale[0]), int(quantization.zeroPoint[0])
        codes = np.clip(np.round(values / scale) + zero_point, limits[kind].min, limits[kind].max)
        return (codes - zero_point) * scale

    def constant(index, dtype):
        if index < 0:
            return 0.0  # a bias left out
        tensor = graph.tensors[index]
        values = flatbuffer.constant(flat, tensor, dtype).astype(np.float64)
        shape = np.ones(values.ndim, int)
        shape[tensor.quantization.quantizedDimension] = -1
        return values * np.asarray(tensor.quantization.scale).reshape(shape)

    real[graph.inputs[0]] = on_grid(graph.inputs[0], image[np.newaxis].astype(np.float64))
    for operator in graph.operators:
        name = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}[
            flatbuffer.operator_code(flat, operator)
        ]
        x, options = real[operator.inputs[0]], operator.builtinOptions
        if name == "CONV_2D":
            kernel = np.moveaxis(constant(operator.inputs[1], np.int8), 0, -1)
            padding = "SAME" if options.padding == schema.Padding.SAME else "VALID"
            dilation = options.dilationHFactor
            y = tf.nn.conv2d(x, kernel, [options.strideH, options.strideW], padding, dilations=dilation).numpy()
            y = y + constant(operator.inputs[2], np.int32)
        elif name == "DEPTHWISE_CONV_2D":
            kernel = constant(operator.inputs[1], np.int8)
            kernel = kernel.reshape(*kernel.shape[1:3], x.shape[-1], -1)
            strides = [1, options.strideH, options.strideW, 1]
            padding = "SAME" if options.padding == schema.Padding.SAME else "VALID"
            y = tf.nn.depthwise_conv2d(x, kernel, strides, padding).numpy() + constant(operator.inputs[2], np.int32)
        elif name == "FULLY_CONNECTED":
            y = x @ constant(operator.inputs[1], np.int8).T + constant(operator.inputs[2], np.int32)
        elif name == "MEAN":
            y = x.mean(axis=(1, 2), keepdims=bool(options.keepDims))
        elif name == "LOGISTIC":
            y = 1 / (1 + np.exp(-x))
        elif name == "MUL":
            y = x * real[operator.inputs[1]]
        elif name == "PAD":
            y = np.pad(x, flatbuffer.constant(flat, graph.tensors[operator.inputs[1]], np.int32))
        elif name in ("QUANTIZE", "DEQUANTIZE"):
            y = x
        else:
            raise AssertionError(f"unexpected operator {name}")
        if getattr(options, "fusedActivationFunction", 0) == schema.ActivationFunctionType.RELU:
            y = np.maximum(y, 0)
        real[operator.outputs[0]] = on_grid(operator.outputs[0], y)
    return real[graph.outputs[0]][0]


def output_step(file):
    """Scale of the last int8 tensor: one step of the logits."""
    flat = flatbuffer.unpack(file)
    (graph,) = flat.subgraphs
    index = graph.outputs[0]
    if graph.tensors[index].type == schema.TensorType.FLOAT32:
        index = graph.operators[-1].inputs[0]
    return float(graph.tensors[index].quantization.scale[0])


def assert_computes_what_it_says(file, images):
    found = tflite.predict(file, images)
    expected = np.stack([simulate(file, image) for image in images])
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= 2.01 * output_step(file)
    assert np.ptp(found) > 20 * output_step(file)  # the comparison means something


@pytest.mark.parametrize("inference_type", ["int8", "uint8", "float32"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_interpreter_computes_what_the_file_says(inference_type, padding):
    model = two_block_model(padding)
    file = tflite.convert(model, calibration(), inference_type=inference_type)
    images = np.stack(calibration(8, seed=1))
    assert_computes_what_it_says(file, images)
    # 8-bit activations and weights stay close to float; a wrong scale in any layer would not.
    expected = model(images).numpy()
    found = tflite.predict(file, images)
    assert found.dtype == np.float32
    assert np.max(np.abs(found - expected)) < 0.08 * np.max(np.abs(expected))
    interpreter, _ = details_of(file)
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
    _, tensors = details_of(file)
    kinds = {np.dtype(tensor["dtype"]) for tensor in tensors.values()}
    assert kinds <= {np.dtype(np.int8), np.dtype(np.int32)}


def test_more_bits_are_closer_to_float(fused, file):
    images = np.stack(calibration(8, seed=1))
    expected = fused(images).numpy()
    errors = [
        np.sqrt(np.mean((tflite.predict(tflite.with_weights(file, fused, bits), images) - expected) ** 2))
        for bits in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_convert_and_with_weights_agree(fused, file):
    assert tflite.convert(fused, calibration(), weight_bits=4, per_channel=False) == tflite.with_weights(
        file, fused, 4, per_channel=False
    )


def test_rewriting_twice_is_rewriting_once(fused, file):
    """The way back from few bits: the layer of each tensor is found in the calibrated file, which holds 8 bits."""
    once = tflite.with_weights(file, fused, 8, per_channel=False)
    assert tflite.with_weights(once, fused, 4) == tflite.with_weights(file, fused, 4)
    assert len(tflite.with_weights(once, fused, 8)) == len(file)


def test_a0_at_224_is_22_convolutions_a_mean_and_a_dense_layer():
    model = fuse(
        build_repvgg("A0", (224, 224, 3), 1000, norm="oabn"), check_inputs=np.zeros((1, 224, 224, 3), "float32")
    )
    file = tflite.convert(model, calibration(2, (224, 224, 3)))
    assert [op.name for op in tflite.operators(file)] == ["CONV_2D"] * 22 + ["MEAN", "FULLY_CONNECTED"]
    assert tflite.operators(file)[0].output_shape == (1, 112, 112, 48)
    assert tflite.operators(file)[-1].output_shape == (1, 1000)
    for layer, found in zip(weighted_layers(model), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(found.codes, quantize_min_max(layer.kernel.numpy()).codes)
    assert model.count_params() < len(file) < 1.1 * model.count_params()


def test_symmetric_padding_costs_a_pad_for_each_strided_block_of_a0():
    model = fuse(build_repvgg("A0", (64, 64, 3), 10, padding="symmetric"))
    counts = collections.Counter(op.name for op in tflite.operators(tflite.convert(model, calibration(2, (64, 64, 3)))))
    assert counts == {"PAD": 5, "CONV_2D": 22, "MEAN": 1, "FULLY_CONNECTED": 1}


def plain_model(*layers, size=(6, 6, 4)):
    return keras.Sequential([keras.Input(size), *layers])


def test_dead_channels(fused):
    """A channel of zero weights is its bias, exactly on its grid, next to living channels."""
    conv = keras.layers.Conv2D(4, 3, padding="same", name="conv")
    model = plain_model(conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, name="dense"))
    kernel = conv.kernel.numpy()
    kernel[..., 1] = 0
    conv.set_weights([kernel, np.float32([0.1, 0.7, -0.2, 0])])
    images = np.stack(calibration(8, (6, 6, 4)))
    for per_channel in (False, True):
        file = tflite.convert(model, images, per_channel=per_channel)
        codes, _ = tflite.weight_codes(file)
        assert np.all(codes.codes[..., 1] == 0) and np.all(codes.scale > 0)
        assert_computes_what_it_says(file, images)
        np.testing.assert_allclose(tflite.predict(file, images), model(images), atol=0.05)


@pytest.mark.parametrize(
    "tiny, bias", [(1e-8, 3.0), (1e-12, 3.0), (1e-30, 3.0), (1e-38, 3.0), (1e-12, 1e-20), (1e-30, 0.0)]
)
def test_nearly_dead_channels(tiny, bias):
    """The scale that such weights ask for would let a large bias overflow its 32 bits."""
    conv = keras.layers.Conv2D(4, 3, padding="same", name="conv")
    model = plain_model(conv, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, name="dense"))
    kernel = conv.kernel.numpy()
    kernel[..., 2] *= tiny
    biases = np.float32([0.1, -0.3, bias, 0.2])
    conv.set_weights([kernel, biases])
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(model, images)
    for rewritten in (file, tflite.with_weights(file, model, per_channel=False)):
        codes, scale, _ = bias_codes(rewritten)[0]
        np.testing.assert_allclose(codes * np.float64(scale), biases, atol=1e-4)
        assert_computes_what_it_says(rewritten, images)
        np.testing.assert_allclose(tflite.predict(rewritten, images), model(images), atol=0.1)


def test_given_codes_that_leave_no_room_for_a_bias(fused, file):
    kernels = {"first": QuantizedKernel(np.ones((3, 3, 3, 8), np.int8), np.float32([1e-12]))}
    with pytest.raises(ValueError, match=r"layer 'first': the bias .* overflows int32.*use a larger weight scale"):
        tflite.with_weights(file, fused, kernels=kernels)


def test_layers_without_bias():
    model = plain_model(
        keras.layers.Conv2D(5, 3, use_bias=False, activation="relu", name="conv"),
        keras.layers.Conv2D(6, 1, name="with_bias", bias_initializer=keras.initializers.Constant(0.5)),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(7, use_bias=False, name="dense"),
    )
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(model, images)
    assert len(tflite.weight_codes(file)) == 3
    assert_computes_what_it_says(file, images)
    assert np.max(np.abs(tflite.predict(file, images) - model(images))) < 0.05 * np.max(np.abs(model(images)))


def test_layers_with_the_same_kernel_keep_their_own_biases():
    """Identical kernels share one buffer in the file; their layers differ in bias alone."""
    kernel = keras.initializers.HeNormal(seed=3)
    first, second = (
        keras.layers.Conv2D(4, 3, padding="same", kernel_initializer=kernel, name=name) for name in ("first", "second")
    )
    inputs = keras.Input((6, 6, 4))
    features = second(keras.layers.ReLU()(first(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(3, name="dense")(keras.layers.GlobalAveragePooling2D()(features)))
    np.testing.assert_array_equal(first.kernel, second.kernel)
    first.bias.assign([1.0, 0.5, 0.2, 0.1])
    second.bias.assign([-2.0, 2.0, 0.0, -0.5])
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(model, images)
    (one, scale, _), (two, other_scale, _) = bias_codes(file)
    np.testing.assert_allclose(one * np.float64(scale), first.bias, atol=1e-3)
    np.testing.assert_allclose(two * np.float64(other_scale), second.bias, atol=1e-3)
    assert_computes_what_it_says(file, images)


def test_grouped_and_dilated_convolutions():
    inputs = keras.Input((9, 9, 4))
    features = RepVGGBlock(8, groups=2, name="grouped")(inputs)
    features = RepVGGBlock(8, dilation_rate=2, name="dilated")(features)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(features)))
    randomize(model)
    fused = fuse(model)
    images = np.stack(calibration(8, (9, 9, 4)))
    file = tflite.convert(fused, images)
    for layer, found in zip(weighted_layers(fused), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(found.codes, quantize_min_max(layer.kernel.numpy()).codes)
    expected = fused(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.08 * np.max(np.abs(expected))


def test_any_image_size_becomes_that_of_the_calibration_images():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(RepVGGBlock(4)(inputs)))
    randomize(model)
    fused = fuse(model)
    file = tflite.convert(fused, calibration(4))
    assert tflite.operators(file)[0].output_shape == (1, 12, 11, 4)
    assert_computes_what_it_says(file, np.stack(calibration(4)))


def test_metadata_is_in_the_file(fused, file):
    facts = {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 128.0}
    with_facts = tflite.convert(fused, calibration(2), metadata=facts)
    for content in (with_facts, tflite.with_weights(file, fused, metadata=facts)):
        flat = schema.ModelT.InitFromPackedBuf(content, 0)
        entries = {entry.name: bytes(flat.buffers[entry.buffer].data) for entry in flat.metadata}
        assert json.loads(entries[METADATA_NAME.encode()]) == facts
        assert METADATA_NAME == "TF_REPVGG_INPUT"
    # The interpreter does not mind.
    images = np.stack(calibration(2))
    assert tflite.predict(with_facts, images).shape == (2, 5)


def test_metadata_written_again_replaces_the_old(fused):
    first = tflite.convert(fused, calibration(2), metadata={"dataset": "old"})
    flat = schema.ModelT.InitFromPackedBuf(tflite.with_weights(first, fused, 4, metadata={"dataset": "new"}), 0)
    ours = [entry for entry in flat.metadata if entry.name == METADATA_NAME.encode()]
    assert [json.loads(bytes(flat.buffers[entry.buffer].data)) for entry in ours] == [{"dataset": "new"}]


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
    images = np.stack(calibration(4, seed=1))
    expected = tflite.predict(file, images)
    np.testing.assert_array_equal(tflite.predict(moved, images), expected)
    rewritten = flatbuffer.pack(flatbuffer.unpack(moved))
    np.testing.assert_array_equal(tflite.predict(rewritten, images), expected)
    with pytest.raises(ValueError, match="a constant ends at byte"):
        flatbuffer.unpack(moved[:-8])


def test_bad_arguments(fused, file):
    with pytest.raises(ValueError, match="inference_type is 'int4'; known for activations of 8 bits: int8, uint8"):
        tflite.convert(fused, calibration(), inference_type="int4")
    with pytest.raises(ValueError, match="no calibration images; activation ranges need at least one"):
        tflite.convert(fused, [])
    with pytest.raises(ValueError, match=r"calibration image 1 has shape \(12, 12, 3\); the model's input is"):
        tflite.convert(fused, [np.zeros(SIZE), np.zeros((12, 12, 3))])
    with pytest.raises(ValueError, match=r"calibration image 0 has shape \(1, 12, 11, 3\)"):
        tflite.convert(fused, [np.zeros((1, *SIZE))])
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
        tflite.convert(model, calibration())
    nested = keras.Sequential([keras.Input(SIZE), model])
    with pytest.raises(ValueError, match="block 'stem' is still in training form"):
        tflite.convert(nested, calibration())


def test_a_file_of_another_model_is_refused(fused, file):
    keras.utils.set_random_seed(7)
    with pytest.raises(ValueError, match="are those of no layer of the model"):
        tflite.with_weights(file, two_block_model(), 4)
    for content in (b"", b"short", b"\0" * 100, b"PK" + file):
        with pytest.raises(ValueError, match="not a TFLite file"):
            tflite.operators(content)


def test_predict_with_fewer_images_than_cores_and_with_none(file, fused):
    images = np.stack(calibration(3))
    together = tflite.predict(file, images)
    np.testing.assert_array_equal(together[1:2], tflite.predict(file, images[1:2]))
    assert tflite.predict(file, images[:0]).shape == (0, 5)


def test_latency(file):
    found = tflite.latency(file, threads=2, runs=50)
    assert 0 < found.p50_ms <= found.p90_ms < 1000
    assert (found.runs, found.threads) == (50, 2)


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
    interpreter, _ = details_of(digits_file)
    (details,) = interpreter.get_input_details()
    assert details["quantization"] == (1 / 128, 0)


@pytest.mark.parametrize(
    "make, bits",
    [(lambda size: keras.layers.SeparableConv2D(2, size), 8), (lambda size: keras.layers.Conv2DTranspose(2, size), 4)],
)
def test_layers_that_cannot_be_written_are_named(make, bits):
    inputs = keras.Input(SIZE)
    layer = make(3)
    model = keras.Model(inputs, layer(inputs))
    with pytest.raises(ValueError, match=f"{layer.name}.*{type(layer).__name__}"):
        tflite.convert(model, calibration(2), weight_bits=bits)


@pytest.fixture(scope="module")
def depthwise_model():
    keras.utils.set_random_seed(0)
    model = plain_model(
        keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu", name="double"),
        keras.layers.DepthwiseConv2D((3, 2), strides=2, use_bias=False, name="strided"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, name="dense"),
    )
    # Channels of unlike ranges, so that a scale on the wrong channel shows.
    model.get_layer("double").depthwise_kernel.assign(
        model.get_layer("double").depthwise_kernel * np.linspace(0.2, 3, 8).reshape(4, 2)
    )
    model.get_layer("double").bias.assign(np.linspace(-0.5, 1, 8))
    return model


def as_grouped(kernel):
    """A depthwise kernel as the grouped convolution it is."""
    return kernel.numpy().reshape(*kernel.shape[:2], 1, -1)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_depthwise_convolutions_code_for_code(depthwise_model, bits, per_channel):
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(depthwise_model, images, weight_bits=bits, per_channel=per_channel)
    names = [operator.name for operator in tflite.operators(file)]
    assert names == ["DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED"]
    for name, found in zip(("double", "strided"), tflite.weight_codes(file)[:2], strict=True):
        kernel = as_grouped(depthwise_model.get_layer(name).depthwise_kernel)
        expected = quantize_min_max(kernel, bits, per_channel)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scale, expected.scale)
        np.testing.assert_allclose(found.dequantize(), kernel, atol=0.51 * np.max(expected.scale))
    _, tensors = details_of(file)
    double = next(tensor for tensor in tensors.values() if tuple(tensor["shape"]) == (1, 3, 3, 8))
    assert double["quantization_parameters"]["quantized_dimension"] == 3
    assert len(double["quantization_parameters"]["scales"]) == (8 if per_channel else 1)
    assert_computes_what_it_says(file, images)
    if bits == 8:
        expected = depthwise_model(images).numpy()
        assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.05 * np.max(np.abs(expected))


def test_given_codes_of_a_depthwise_convolution(depthwise_model):
    generator = np.random.default_rng(0)
    codes = generator.choice([-100, -7, 0, 30, 127], (3, 3, 1, 8)).astype(np.int8)
    given = QuantizedKernel(codes, generator.uniform(0.01, 0.02, 8).astype(np.float32))
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(depthwise_model, images, kernels={"double": given})
    np.testing.assert_array_equal(tflite.weight_codes(file)[0].codes, codes)
    np.testing.assert_array_equal(tflite.weight_codes(file)[0].scale, given.scale)
    assert_computes_what_it_says(file, images)
    wrong = QuantizedKernel(codes.reshape(3, 3, 4, 2), given.scale)
    with pytest.raises(ValueError, match=r"'double': the codes have shape \(3, 3, 4, 2\), its kernel \(3, 3, 1, 8\)"):
        tflite.with_weights(file, depthwise_model, kernels={"double": wrong})


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_squeeze_excite_survives(per_channel):
    inputs = keras.Input(SIZE)
    features = RepVGGBlock(8, strides=2, se_reduction=2, padding="symmetric", name="first")(inputs)
    features = QARepVGGBlock(8, groups=4, se_reduction=4, name="second")(features)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(pooled))
    randomize(model, dead_share=0)
    fused = fuse(model)
    images = np.stack(calibration(8))
    file = tflite.convert(fused, images, per_channel=per_channel)
    squeeze_excite = {"MEAN": 1, "CONV_2D": 2, "LOGISTIC": 1, "MUL": 1}
    expected_operators = collections.Counter({"PAD": 1, "CONV_2D": 2, "MEAN": 1, "FULLY_CONNECTED": 1})
    expected_operators.update({name: 2 * count for name, count in squeeze_excite.items()})
    assert collections.Counter(operator.name for operator in tflite.operators(file)) == expected_operators
    for bits in (8, 4):
        found = tflite.weight_codes(tflite.with_weights(file, fused, bits, per_channel))
        for layer, weights in zip(weighted_layers(fused), found, strict=True):
            expected = quantize_min_max(layer.kernel.numpy(), bits, per_channel)
            np.testing.assert_array_equal(weights.codes, expected.codes)
            np.testing.assert_array_equal(weights.scale, expected.scale)
    assert_computes_what_it_says(file, images)
    expected = fused(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.08 * np.max(np.abs(expected))


@pytest.mark.parametrize("tiny", [1.0, 1e-4], ids=["one weight tensor", "one for each use"])
def test_a_layer_used_twice_has_a_bias_for_each_use(tiny):
    """A head shared by feature maps of unlike ranges. Where a bias needs other weight scales, tensors are parted."""
    shared = keras.layers.Conv2D(5, 3, padding="same", name="shared", bias_initializer=keras.initializers.Constant(0.3))
    inputs = keras.Input((6, 6, 4))
    small = keras.layers.Conv2D(4, 1, activation="relu", kernel_initializer=keras.initializers.Constant(1e-3))(inputs)
    both = keras.layers.Concatenate()([shared(inputs), shared(small)])
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(both)))
    shared.kernel.assign(shared.kernel * np.float32([1, 1, 1, tiny, tiny**2]))
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(model, images)
    uses = [bias for bias in bias_codes(file) if len(bias[0]) == 5]
    kernels = [found for found in tflite.weight_codes(file) if found.codes.shape == (3, 3, 4, 5)]
    assert len(uses) == len(kernels) == 2
    assert np.array_equal(kernels[0].scale, kernels[1].scale) == (tiny == 1)
    for (codes, scale, input_scale), kernel in zip(uses, kernels, strict=True):
        np.testing.assert_allclose(codes * np.float64(scale), 0.3, atol=1e-3)
        np.testing.assert_allclose(scale, np.float64(input_scale) * kernel.scale, rtol=1e-6)
    expected = model(images).numpy()
    assert np.max(np.abs(tflite.predict(file, images) - expected)) < 0.05 * np.max(np.abs(expected))


def test_layers_that_share_a_tensor_in_the_file_are_parted():
    """Layers with equal kernels, which the converter merges; one is given other codes."""
    kernel = keras.initializers.HeNormal(seed=3)
    first, second = (
        keras.layers.Conv2D(4, 3, padding="same", kernel_initializer=kernel, bias_initializer=bias, name=name)
        for name, bias in (("first", "ones"), ("second", keras.initializers.Constant(0.9)))
    )
    inputs = keras.Input((6, 6, 4))
    features = second(keras.layers.ReLU()(first(inputs)))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(features))
    given = quantize_min_max(first.kernel.numpy(), 3)
    images = np.stack(calibration(8, (6, 6, 4)))
    file = tflite.convert(model, images, kernels={"first": given})
    one, two = tflite.weight_codes(file)
    np.testing.assert_array_equal(one.codes, given.codes)
    np.testing.assert_array_equal(two.codes, quantize_min_max(first.kernel.numpy()).codes)
    assert_computes_what_it_says(file, images)


def test_activations_that_calibration_found_dead():
    """XNNPACK refuses to load what the converter makes of an activation that is always zero."""
    model = plain_model(
        keras.layers.Conv2D(4, 3, activation="relu", name="dead", bias_initializer=keras.initializers.Constant(-99.0)),
        keras.layers.Conv2D(4, 3, name="after", bias_initializer=keras.initializers.Constant(0.5)),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3),
    )
    images = np.stack(calibration(4, (6, 6, 4)))
    found = tflite.predict(tflite.convert(model, images), images)
    np.testing.assert_allclose(found, model(images), atol=0.02)


@pytest.mark.parametrize("names", [("last", "first"), ("output_0", "output_1")])
def test_several_outputs_have_the_names_of_the_model(names):
    inputs = keras.Input((6, 6, 4))
    features = keras.layers.Conv2D(4, 3)(inputs)
    outputs = [keras.layers.Conv2D(2, 1, name="z")(features), keras.layers.Conv2D(3, 1, name="a")(features)]
    model = keras.Model(inputs, outputs if "output_0" in names else dict(zip(names, outputs, strict=True)))
    images = np.stack(calibration(4, (6, 6, 4)))
    found = tflite.predict(tflite.convert(model, images), images)
    expected = dict(zip(names, keras.Model(inputs, outputs)(images), strict=True))
    assert found.keys() == expected.keys()
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=0.05 * np.max(np.abs(expected[name])))


def test_codes_for_a_name_that_two_layers_have_are_refused():
    make = lambda name: keras.Sequential([keras.Input((6, 6, 4)), keras.layers.Conv2D(4, 1, name="conv")], name=name)  # noqa: E731
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, keras.layers.Concatenate()([make("left")(inputs), make("right")(inputs)]))
    images = calibration(4, (6, 6, 4))
    file = tflite.convert(model, images)
    kernels = {"conv": QuantizedKernel(np.ones((1, 1, 4, 4), np.int8), np.float32([0.1]))}
    with pytest.raises(ValueError, match=r"kernels names 'conv', but 2 layers of the nested models are called so"):
        tflite.with_weights(file, model, kernels=kernels)
