"""Measuring files side by side; a damaged file costs one line of error, whatever it does to native code."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from ai_edge_litert import schema_py_generated as schema
from helpers.networks import random_images, small_repvgg

from tf_repvgg import native_output, tflite
from tf_repvgg.tflite import flatbuffer, reader
from tf_repvgg.tflite.isolated import Isolated

DAMAGED_FILES = 500


@pytest.fixture(scope="module")
def file():
    keras.utils.set_random_seed(0)
    return tflite.convert(small_repvgg(), random_images(8))


@pytest.fixture(scope="module")
def digits_file(fused_digits, digits):
    return tflite.convert(fused_digits, digits.calibration(32).as_numpy_iterator(), metadata=digits.metadata())


def test_costs(file):
    """6x6 outputs of 8 channels twice, and a dense layer."""
    costs = tflite.costs(file)
    assert costs.macs == 36 * 8 * 27 + 36 * 8 * 72 + 8 * 5
    assert costs.weight_bytes == 8 * 27 + 8 * 72 + 8 * 5
    assert 5 < costs.weight_entropy_bits < 8
    assert reader.entropy_bits(np.int8([1, 1, 2, 2, 3, 3, 4, 4])) == 2
    assert reader.entropy_bits(np.int8([7, 7])) == 0


def test_in_a_process_of_its_own(file):
    with Isolated("a.tflite", file) as isolated:
        assert len(isolated.times(5)) == 5 and min(isolated.times(3)) > 0
        assert isolated.throughput(4, 3).batch == 4 and isolated.throughput(4, 3).images_per_second > 0
        np.testing.assert_array_equal(isolated.predict(random_images(3)), tflite.predict(file, random_images(3)))
        assert isolated.costs() == tflite.costs(file)
        assert isolated.peak_memory_mib() >= 0
        assert isolated.metadata("nothing") is None


def convert_function(function, *shapes, dtypes=(), **settings):
    """A float file of TensorFlow's own for a function of tensors of some shapes; types are float32 unless given."""
    dtypes = [*dtypes, *[tf.float32] * (len(shapes) - len(dtypes))]
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    function = tf.function(function).get_concrete_function(*specs)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    for name, value in settings.items():
        setattr(converter, name, value)
    with native_output.hide():
        return converter.convert()


def make_recurrent_file(steps, size, cells):
    """A recurrent layer whose state is a variable tensor of a fixed size. The converter takes seconds for one."""
    shapes = [(1, steps, size), (cells, size), (cells, cells), (cells,), (1, cells), (1, steps, cells)]
    flat = flatbuffer.unpack(convert_function(lambda x: x + 1, (1, 1)))
    (graph,) = flat.subgraphs
    graph.tensors = [schema.TensorT() for _ in shapes]
    for index, (tensor, shape) in enumerate(zip(graph.tensors, shapes, strict=True)):
        tensor.name, tensor.shape, tensor.isVariable = f"tensor{index}", list(shape), index == 4
        if index in (1, 2, 3):
            flat.buffers.append(buffer := schema.BufferT())
            buffer.data, tensor.buffer = np.zeros(4 * np.prod(shape), np.uint8), len(flat.buffers) - 1
    (operator,) = graph.operators
    operator.inputs, operator.outputs, operator.builtinOptions = [0, 1, 2, 3, 4], [5], schema.SequenceRNNOptionsT()
    operator.builtinOptionsType = schema.BuiltinOptions.SequenceRNNOptions
    flat.operatorCodes[0].builtinCode = schema.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_RNN
    flat.operatorCodes[0].deprecatedBuiltinCode = schema.BuiltinOperator.UNIDIRECTIONAL_SEQUENCE_RNN
    graph.inputs, graph.outputs, flat.signatureDefs = [0], [5], None
    return flatbuffer.pack(flat)


def convolve(images):
    return tf.nn.conv2d(images, tf.ones([3, 3, 3, 4]), 1, "SAME")


def test_files_of_any_tool():
    """Right MACs per inference of the whole batch, and images per second that count the batch which really ran."""
    image, macs = (1, 8, 8, 3), 64 * 27 * 4
    half = tf.lite.TargetSpec(supported_types=[tf.float16])
    files = {  # file, images of an inference and of a batch of 8 requested, MACs, bytes of weights
        "batch 4": (convert_function(convolve, (4, 8, 8, 3)), 4, 4, 4 * macs, 432),
        "open batch": (convert_function(convolve, (None, 8, 8, 3)), 1, 8, macs, 432),
        "float16 weights": (
            convert_function(convolve, image, target_spec=half, optimizations=[tf.lite.Optimize.DEFAULT]),
            *(1, 8, macs, 216),
        ),
        "float16 image": (
            convert_function(lambda x: convolve(tf.cast(x, tf.float32)), image, dtypes=[tf.float16]),
            *(1, 8, macs, 432),
        ),
        "several inputs": (
            convert_function(
                lambda mask, index, scalar, x: tf.where(mask, convolve(x) * scalar + tf.gather([0.0, 1.0], index), 0),
                *((), (1,), (), image),
                dtypes=[tf.bool, tf.int64],
            ),
            *(1, 8, macs, 432),
        ),
        "fixed reshape": (convert_function(lambda x: tf.reshape(convolve(x), [1, 256]), image), 1, 1, macs, 432),
        "state": (make_recurrent_file(steps=6, size=4, cells=5), 1, 1, 6 * (4 * 5 + 5 * 5), 4 * (4 * 5 + 5 * 5)),
        "transposed": (
            convert_function(lambda x: tf.nn.conv2d_transpose(x, tf.ones([3, 3, 5, 3]), [1, 16, 16, 5], 2), image),
            *(1, 8, 64 * 27 * 5, 540),
        ),
        "product of two inputs": (convert_function(tf.matmul, (2, 8, 6), (2, 6, 5)), 2, 2, 2 * 8 * 6 * 5, 0),
        "a vector": (convert_function(lambda x: x + 1, (8,)), 1, 1, 0, 0),
        "a loop": (
            convert_function(
                lambda x: tf.while_loop(lambda y: tf.reduce_sum(y) < 0, lambda y: (tf.matmul(y, y),), [x])[0], (2, 2)
            ),
            *(2, 2, None, 0),
        ),
    }
    for name, (file, batch, throughput_batch, macs, weight_bytes) in files.items():
        with Isolated(name, file) as isolated:
            assert isolated.batch() == batch, name
            assert isolated.throughput(8, 3).batch == throughput_batch, name
            assert len(isolated.times(2)) == 2 and isolated.costs()[:2] == (macs, weight_bytes), name
    refused = {
        "any size": (
            convert_function(convolve, (1, None, None, 3)),
            r"has shape \[1, \?, \?, 3\]; convert .* fixed size",
        ),
        "text": (convert_function(lambda x: tf.equal(x, "a"), (1,), dtypes=[tf.string]), "of type bytes, .* no random"),
    }
    for name, (file, message) in refused.items():
        with Isolated(name, file) as isolated, pytest.raises(ValueError, match=f"{name}: .*{message}"):
            isolated.times(1)


def test_operator_codes_of_old_files(file):
    """Files of before 2020 have their codes in another field alone."""
    flat = flatbuffer.unpack(file)
    for code in flat.operatorCodes:
        code.deprecatedBuiltinCode, code.builtinCode = code.builtinCode, 0
    assert tflite.operators(flatbuffer.pack(flat)) == tflite.operators(file)
    assert tflite.costs(flatbuffer.pack(flat)) == tflite.costs(file)


def mutate(file, seed):
    """Random bytes changed, or the end cut off, or both."""
    generator = np.random.default_rng(seed)
    content = np.frombuffer(file, np.uint8).copy()
    if seed % 3:
        places = generator.integers(0, len(content), generator.integers(1, 40))
        content[places] = generator.integers(0, 256, len(places))
    if seed % 3 != 1:
        content = content[: generator.integers(1, len(content))]
    return content.tobytes()


def test_damaged_files(run_program, file, tmp_path):
    """The command measures each file or refuses it in one line; none crashes or blocks it."""
    for seed in range(DAMAGED_FILES):
        (tmp_path / f"{seed:03}.tflite").write_bytes(mutate(file, seed))
    result = run_program("tests/helpers/damaged_files.py", tmp_path, 20, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout)
    assert len(outcomes) == DAMAGED_FILES and {outcome["status"] for outcome in outcomes} == {0, 2}
    refused = [outcome for outcome in outcomes if outcome["status"] == 2]
    assert len(refused) > DAMAGED_FILES / 2
    for outcome in refused:
        assert f"error: {outcome['file']}: " in outcome["stderr"].splitlines()[-1]
    assert not any("Traceback" in outcome["stderr"] for outcome in outcomes)


def test_crashes_are_reported(file):
    with Isolated("a.tflite", file) as isolated:
        isolated.times(1)
        os.kill(isolated.process_id, signal.SIGSEGV)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"a.tflite: LiteRT crashed \(SIGSEGV\); the file may be damaged"):
                isolated.times(1)


def test_hangs_are_reported(file, monkeypatch):
    monkeypatch.setattr("tf_repvgg.tflite.isolated.SECONDS", 0)
    with Isolated("a.tflite", file) as isolated:
        with pytest.raises(ValueError, match=r"a.tflite: LiteRT did not answer within 0 s; the file may be damaged"):
            isolated.times(10**6)
        process_id = isolated.process_id
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_the_command(run_forked, digits_file, file, tmp_path):
    (tmp_path / "a.tflite").write_bytes(digits_file)
    (tmp_path / "b.tflite").write_bytes(file)
    both = f"--files={tmp_path}/a.tflite,{tmp_path}/b.tflite"
    result = run_forked("export/benchmark.py", both, "--runs=20", f"--output={tmp_path}/out")
    assert result.status == 0, result.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["files"]
    assert [row["file_bytes"] for row in rows] == [len(digits_file), len(file)]
    assert all(0 < row["latency_ms_p50"] <= row["latency_ms_p90"] <= row["latency_ms_p99"] for row in rows)
    with open(tmp_path / "out" / "benchmark.csv", newline="") as lines:
        assert [row["macs"] for row in csv.DictReader(lines)] == [str(row["macs"]) for row in rows]
    assert "bits/weight" in result.stdout

    result = run_forked("export/benchmark.py", f"--files={tmp_path}/a.tflite", "--runs=10", "--dataset=digits")
    assert result.status == 0 and "top-1 %" in result.stdout


def test_bad_input(run_forked, file, tmp_path):
    (tmp_path / "cut.tflite").write_bytes(file[:1000])
    (tmp_path / "text.tflite").write_text("nothing of the kind")
    (tmp_path / "whole.tflite").write_bytes(file)
    for arguments, message in (
        ([f"--files={tmp_path}/cut.tflite"], "cut.tflite: not a whole TFLite file"),
        ([f"--files={tmp_path}/whole.tflite,{tmp_path}/text.tflite"], "text.tflite: not a TFLite file"),
        ([f"--files={tmp_path}/gone.tflite"], "No such file"),
        (["--files="], "--files is empty; name at least one .tflite file"),
        ([f"--files={tmp_path}/whole.tflite", "--runs=10", "--dataset=digits"], "no metadata block TF_REPVGG_INPUT"),
    ):
        result = run_forked("export/benchmark.py", *arguments, f"--output={tmp_path}/out")
        assert result.status == 2
        assert message in result.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "out" / "benchmark.json").exists()
