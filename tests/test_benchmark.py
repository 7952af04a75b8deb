"""Measuring files side by side; a damaged file costs one line of error, whatever it does to native code."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.tflite import reader
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
        assert isolated.throughput(4, 3) > 0
        np.testing.assert_array_equal(isolated.predict(random_images(3)), tflite.predict(file, random_images(3)))
        assert isolated.costs() == tflite.costs(file)
        assert isolated.peak_memory_mib() >= 0
        assert isolated.metadata("nothing") is None


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
        ([f"--files={tmp_path}/whole.tflite", "--runs=10", "--dataset=digits"], "no metadata block TF_REPVGG_INPUT"),
    ):
        result = run_forked("export/benchmark.py", *arguments, f"--output={tmp_path}/out")
        assert result.status == 2
        assert message in result.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "out" / "benchmark.json").exists()
