"""Measuring files side by side, and what damaged ones do: one line, whatever happens inside native code."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.tflite import isolated, reader
from tf_repvgg.tflite.isolated import Isolated

DAMAGED_FILES = 500


@pytest.fixture(scope="module")
def file():
    keras.utils.set_random_seed(0)
    return tflite.convert(small_repvgg(), random_images(8))


@pytest.fixture(scope="module")
def digits_file(fused_digits, digits):
    return tflite.convert(fused_digits, digits.calibration(32).as_numpy_iterator(), metadata=digits.facts())


def test_costs(file):
    """6x6 outputs of 8 channels twice, and a dense layer."""
    found = tflite.costs(file)
    assert found.macs == 36 * 8 * 27 + 36 * 8 * 72 + 8 * 5
    assert found.weight_bytes == 8 * 27 + 8 * 72 + 8 * 5
    assert 5 < found.weight_entropy_bits < 8
    assert reader.entropy_bits(np.int8([1, 1, 2, 2, 3, 3, 4, 4])) == 2
    assert reader.entropy_bits(np.int8([7, 7])) == 0


def test_in_a_process_of_its_own(file):
    with Isolated("a.tflite", file) as ours:
        assert len(ours.times(5)) == 5 and min(ours.times(3)) > 0
        assert ours.throughput(4, 3) > 0
        np.testing.assert_array_equal(ours.predict(random_images(3)), tflite.predict(file, random_images(3)))
        assert ours.costs() == tflite.costs(file)
        assert ours.peak_memory_mib() >= 0
        assert ours.metadata("nothing") is None


def mutated(file, seed):
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
    """The command measures each, or refuses it in one line; none ends or blocks it."""
    for seed in range(DAMAGED_FILES):
        (tmp_path / f"{seed:03}.tflite").write_bytes(mutated(file, seed))
    result = run_program("tests/helpers/damaged_files.py", tmp_path, 20, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    outcomes = json.loads(result.stdout)
    assert len(outcomes) == DAMAGED_FILES and {each["status"] for each in outcomes} == {0, 2}
    refused = [each for each in outcomes if each["status"] == 2]
    assert len(refused) > DAMAGED_FILES / 2
    for each in refused:
        assert f"error: {each['file']}: " in each["stderr"].splitlines()[-1]
    assert not any("Traceback" in each["stderr"] for each in outcomes)


def test_crashes_are_told(file, monkeypatch):
    def crash(*_):
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(isolated.interpreter, "loaded", crash)
    with Isolated("a.tflite", file) as crashing, pytest.raises(ValueError, match=r"LiteRT crashed \(SIGSEGV\)"):
        crashing.times(1)


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
    for words, message in (
        ([f"--files={tmp_path}/cut.tflite"], "cut.tflite: not a whole TFLite file"),
        ([f"--files={tmp_path}/whole.tflite,{tmp_path}/text.tflite"], "text.tflite: not a TFLite file"),
        ([f"--files={tmp_path}/gone.tflite"], "No such file"),
        ([f"--files={tmp_path}/whole.tflite", "--runs=10", "--dataset=digits"], "no metadata block TF_REPVGG_INPUT"),
    ):
        result = run_forked("export/benchmark.py", *words, f"--output={tmp_path}/out")
        assert result.status == 2
        assert message in result.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "out" / "benchmark.json").exists()
