"""Files for other runtimes: run where there is an interpreter, compiled where there is a compiler, or refused."""

import json
import sys

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg

from tf_repvgg import runs, tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import ptq
from tf_repvgg.tflite import flatbuffer, targets
from tf_repvgg.tflite.targets import base, edge_tpu


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


def make_file(model, method, bits, per_channel=False, **options):
    return tflite.convert(ptq.quantize(model, method, bits, per_channel, random_images(32), **options))


@pytest.fixture(scope="module")
def clustered(model):
    return make_file(model, "codebook", 3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_int4_weights(model, per_channel):
    """Half the bytes, and on the same kernels the same outputs."""
    file = make_file(model, "min_max", 4, per_channel)
    built = targets.TARGETS["litert_int4"](file)
    batch = random_images(8, seed=1)
    np.testing.assert_array_equal(built.predict(batch), built.predict_int8(batch))
    assert built.record["int4_weight_bytes"] == (3 * 3 * 3 * 8 + 3 * 3 * 8 * 8 + 8 * 5) // 2
    int4_file = built.files["_int4.tflite"]
    for actual, expected in zip(tflite.weight_codes(int4_file), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(actual.codes, expected.codes)
        np.testing.assert_array_equal(actual.scale, expected.scale)


def test_mixed_widths(model):
    """Weights that do not fit into 4 bits stay as they are."""
    file = make_file(model, "min_max", "first=8,.*=4")
    built = targets.TARGETS["litert_int4"](file)
    assert built.record["left_in_int8"] == ["first/kernel"]
    batch = random_images(4, seed=1)
    np.testing.assert_array_equal(built.predict(batch), built.predict_int8(batch))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_packing(count):
    codes = np.random.default_rng(0).integers(-8, 8, count).astype(np.int8)
    packed = flatbuffer.pack_int4(codes)
    assert packed.dtype == np.uint8 and len(packed) == (count + 1) // 2
    np.testing.assert_array_equal(flatbuffer.unpack_int4(packed, count), codes)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("clusters", [2, 3, 8, 100])
def test_codebooks_in_tflite_micro(model, clusters, per_channel):
    """Bit for bit the int8 file, on every image."""
    file = make_file(model, "codebook", 8, per_channel, number_of_clusters=clusters)
    built = targets.TARGETS["tflm_lut"](file)
    batch = random_images(8, seed=1)
    np.testing.assert_array_equal(built.predict(batch), built.predict_int8(batch))
    assert [layer["tensor"] for layer in built.record["layers"]] == ["first/kernel", "second/kernel", "logits/kernel"]
    for layer in built.record["layers"]:
        assert layer["codes"] <= clusters
        bits = max(1, int(np.ceil(np.log2(layer["codes"]))))
        assert layer["index_bits"] in (None, bits)
        assert layer["bytes"] <= layer["weights"]
    assert built.record["arena_bytes"] >= built.record["arena_bytes_of_int8_file"] > 1000
    source = built.files["_lut.cc"].decode()
    assert source.count("0x") == len(built.files["_lut.tflite"]) and "alignas(16)" in source


def test_size_of_codebooks():
    """3 bits per weight where weights are most of a file."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3))
    features = RepVGGBlock(48, strides=2, name="first")(inputs)
    features = keras.layers.GlobalAveragePooling2D()(RepVGGBlock(48, name="second")(features))
    model = fuse(keras.Model(inputs, keras.layers.Dense(5, name="logits")(features)))
    file = tflite.convert(ptq.quantize(model, "codebook", 3, False, random_images(8, (12, 12, 3))))
    record = targets.TARGETS["tflm_lut"](file).record
    assert record["file_over_bound"] <= 1.10
    assert record["weight_bytes"] < 0.41 * record["int8_weight_bytes"]


@pytest.mark.parametrize("accelerator", ["ethos_u55_32", "ethos_u65_512", "ethos_u85_2048"])
def test_vela(clustered, accelerator):
    built = targets.TARGETS[accelerator](clustered)
    assert built.record["cpu_operators"] == 0 < built.record["npu_operators"]
    encoded, raw = built.record["encoded_weight_bytes"], built.record["raw_weight_bytes"]
    assert raw == 832 and built.record["encoded_over_raw"] == pytest.approx(encoded / raw, abs=1e-4)
    assert built.record["inference_ms_estimated"] > 0 and built.record["sram_bytes"] > 0
    ((suffix, content),) = built.files.items()
    assert suffix == f"_{accelerator}_vela.tflite" and content[4:8] == b"TFL3"


def test_vela_packs_codebooks_tighter():
    """Fewer distinct weights give shorter codes, where weights are many enough for its headers not to matter."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 32))
    model = fuse(keras.Model(inputs, RepVGGBlock(64, name="first")(inputs)))
    batch = random_images(8, (8, 8, 32))
    plain, clustered = (
        targets.TARGETS["ethos_u55_128"](tflite.convert(ptq.quantize(model, method, bits, False, batch))).record
        for method, bits in (("min_max", 8), ("codebook", 3))
    )
    assert clustered["raw_weight_bytes"] == plain["raw_weight_bytes"]
    assert clustered["encoded_over_raw"] < 0.75 * plain["encoded_over_raw"]


def test_edge_tpu_rules(model, clustered):
    record = targets.TARGETS["edge_tpu"](clustered).record
    assert record["mapped_operators"] == 4 and record["cpu_operators"] == 0 and record["fits_cache"]
    assert "published rules only" in record["compiler"]


def test_edge_tpu_and_grouped_convolutions():
    """A file has one version of an operator: a grouped convolution keeps the plain ones off too."""
    inputs = keras.Input((8, 8, 4))
    features = RepVGGBlock(4, name="first")(inputs)
    features = RepVGGBlock(4, groups=2, name="grouped")(features)
    file = tflite.convert(fuse(keras.Model(inputs, features)), random_images(8, (8, 8, 4)))
    first, grouped = edge_tpu.check(file)["operators"]
    assert first["reason"] == grouped["reason"] == "its version is 6; the compiler knows up to 5"
    flat = flatbuffer.unpack(file)
    for code in flat.operatorCodes:
        code.version = 3
    first, grouped = edge_tpu.check(flatbuffer.pack(flat))["operators"]
    assert first["is_mapped"] and grouped["reason"] == "it is grouped: its kernel takes 2 of 4 channels"


def test_edge_tpu_graph_is_cut():
    """Operators after one that is not mapped run on the CPU too."""
    inputs = keras.Input((8, 8, 4))
    features = keras.layers.Softmax(name="rows")(RepVGGBlock(4, name="first")(inputs))
    features = RepVGGBlock(4, name="last")(features)
    file = tflite.convert(fuse(keras.Model(inputs, features)), random_images(8, (8, 8, 4)))
    operators = edge_tpu.check(file)["operators"]
    assert [operator["is_mapped"] for operator in operators] == [True, False, *[False] * (len(operators) - 2)]
    assert "one dimension of at most 16,000 is mapped" in operators[1]["reason"]
    assert operators[-1]["reason"] == "it comes after an operator that stays on the CPU"


def test_edge_tpu_needs_integers():
    inputs = keras.Input((8, 8, 4))
    fused = fuse(keras.Model(inputs, RepVGGBlock(4, name="first")(inputs)))
    file = tflite.convert(fused, random_images(8, (8, 8, 4)), inference_type="float32")
    quantize, convolution, dequantize = edge_tpu.check(file)["operators"]
    assert "is float32" in quantize["reason"] and not convolution["is_mapped"] and not dequantize["is_mapped"]


COMPILER_LOG = """Edge TPU Compiler version 16.0.384591198
Model compiled successfully in 391 ms.
On-chip memory used for caching model parameters: 1.52MiB
Off-chip memory used for streaming uncached model parameters: 10.25KiB
Number of Edge TPU subgraphs: 1
Number of operations that will run on Edge TPU: 9
Number of operations that will run on CPU: 1

Operator                       Count      Status

CONV_2D                        8          Mapped to Edge TPU
FULLY_CONNECTED                1          Operation version not supported
"""


def test_edge_tpu_compiler_where_there_is_one(clustered, tmp_path, monkeypatch):
    """A program that stands in for it: it writes its file and its log."""
    program = tmp_path / edge_tpu.COMPILER
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen(sys.argv[2] + '/model_edgetpu.tflite', 'wb').write(b'compiled')\n"
        f"print({COMPILER_LOG!r})\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    built = targets.TARGETS["edge_tpu"](clustered)
    assert built.files == {"_edgetpu.tflite": b"compiled"}
    log = built.record["compiler"]
    assert (log["version"], log["edge_tpu_operators"], log["cpu_operators"]) == ("16.0.384591198", 9, 1)
    assert (log["cached_bytes"], log["streamed_bytes"]) == (round(1.52 * 2**20), round(10.25 * 2**10))
    assert log["operators"][1]["status"] == "Operation version not supported"
    program.write_text("#!/bin/sh\necho Invalid model >&2\nexit 1\n")
    with pytest.raises(ValueError, match="edgetpu_compiler refused the file: Invalid model"):
        targets.TARGETS["edge_tpu"](clustered)


def test_refusals(model, monkeypatch):
    with pytest.raises(ValueError, match="target is 'tpu'; known: litert_int8, litert_int4, tflm_lut, edge_tpu, ethos"):
        targets.parse(["litert_int8", "tpu"])
    many = make_file(model, "min_max", 8)
    with pytest.raises(ValueError, match="no weights fit into 4 bits, codes -8 to 7: the largest here is 127"):
        targets.TARGETS["litert_int4"](many)
    for name in targets.TARGETS:
        with pytest.raises(ValueError, match="not a TFLite file"):
            targets.TARGETS[name](b"nothing of the kind")
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    with pytest.raises(ValueError, match=r"needs tflite-micro; install it with: pip install 'tf_repvgg\[targets\]'"):
        targets.check_installed(["litert_int8", "tflm_lut"])


def test_float_files_are_refused(model):
    flat = flatbuffer.unpack(tflite.convert(model, random_images(4)))
    weights = base.integer_weights(flat)
    weights[0].tensor.type = 0
    for name in ("litert_int8", "litert_int4", "tflm_lut", "ethos_u55_128"):
        with pytest.raises(ValueError, match="are not int8; this target needs a fully integer file"):
            targets.TARGETS[name](flatbuffer.pack(flat))


def test_from_the_command_line(run_forked, trained_digits, digits, tmp_path):
    """The files of every target beside the int8 file, and measurements on the whole split."""
    run = tmp_path / "run"
    run.mkdir()
    trained_digits.save(run / runs.MODEL_NAME)
    (run / runs.INPUT_NAME).write_text(json.dumps(digits.metadata()))
    names = "litert_int8,litert_int4,tflm_lut,ethos_u55_128,edge_tpu"
    result = run_forked("export/main.py", f"--workdir={run}", "--weight_bits=4", f"--targets={names}")
    assert result.status == 0, result.stderr[-3000:]
    (entry,) = json.loads((run / "export" / "export.json").read_text())["files"]
    assert list(entry["targets"]) == names.split(",")
    for name in ("litert_int4", "tflm_lut"):
        record = entry["targets"][name]
        assert record["equal_to_int8_file_on_same_kernels_percent"] == 100
        assert record["agreement_with_litert_percent"] > 98
    assert entry["targets"]["litert_int4"]["latency_ms_p50"] > 0
    for suffix in ("_int4.tflite", "_lut.tflite", "_lut.cc", "_lut.h", "_ethos_u55_128_vela.tflite", ".tflite"):
        assert (run / "export" / f"int8_w4_per_channel{suffix}").stat().st_size > 50
    refused = run_forked("export/main.py", f"--workdir={run}", "--targets=litert_int4", f"--output={tmp_path / 'no'}")
    assert refused.status == 2
    assert "int8_w8_per_channel.tflite, target litert_int4: no weights fit into 4 bits" in refused.stderr
    assert {path.name for path in (tmp_path / "no").iterdir()} <= {".lock", ".unfinished"}
