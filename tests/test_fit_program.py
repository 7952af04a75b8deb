"""export/main.py --fit: a file within its budget, the flagfile for fine-tuning, the curve, and resumption."""

import json
import os
import re

import numpy as np
import pytest

from tf_repvgg import runs
from tf_repvgg.quantization import QuantizedLayer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, trained_digits):
    """A finished run of the digits model, as train/main.py leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    metadata = {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 128.0, "validation_held_out": False}
    (folder / runs.INPUT_NAME).write_text(json.dumps(metadata))
    trained_digits.save(folder / runs.MODEL_NAME)
    return folder


@pytest.fixture(scope="module")
def exported(run_folder, run_forked, tmp_path_factory):
    """An export with a budget and a curve, that has been interrupted after the damages were measured."""
    output = tmp_path_factory.mktemp("export")
    command = [
        "export/main.py",
        f"--workdir={run_folder}",
        f"--output={output}",
        "--targets=tflm_lut",
        "--latency_runs=50",
    ]
    command += [
        "--fit=weights:40kB",
        "--granularity=per_tensor",
        "--ptq=codebook",
        "--calibration_images=64",
        "--fit_evaluations=4",
        "--report",
    ]
    outcome = run_forked(*command, "--fit_curve")
    assert outcome.status == 0, outcome.stderr[-3000:]
    return output, outcome


def test_an_export_fits_its_budget(exported):
    output, outcome = exported
    record = json.loads((output / "export.json").read_text())
    (entry,) = record["files"]
    file_bytes = os.path.getsize(output / "int8_fit_codebook_lut.tflite")
    assert entry["fit"]["file_bytes"] == entry["targets"]["tflm_lut"]["file_bytes"] == file_bytes <= 40_000
    assert f"file bytes: {file_bytes:,} of 40,000" in outcome.stdout
    assert entry["top1_percent"] > 90
    assert not (output / ".unfinished").exists()


def test_a_curve_compares_budgets(exported):
    output, _ = exported
    curve = json.loads((output / "export.json").read_text())["fit_curve"]
    assert len(curve["fitted"]) == 10
    for point in curve["fitted"]:
        assert point["file_bytes"] <= point["budget_bytes"]
    levels = [(point["number"], point["per_channel"]) for point in curve["uniform"]]
    assert levels == [(2**bits, False) for bits in range(1, 8)]
    top1 = np.array([point["top1_percent"] for point in curve["fitted"]])
    assert top1[-1] > 90 and np.all(top1 <= 100)
    page = (output / "report.html").read_text()
    assert "Fitted levels" in page


def test_a_budget_that_cannot_be_met(run_folder, run_forked, tmp_path):
    command = ["export/main.py", f"--workdir={run_folder}", f"--output={tmp_path}", "--targets=tflm_lut"]
    outcome = run_forked(*command, "--fit=weights:1kB", "--ptq=codebook", "--calibration_images=8")
    assert outcome.status == 2
    error = outcome.stderr.splitlines()[-1]
    assert "a file of 1,000 bytes cannot be met on tflm_lut: the smallest choice, 2" in error
    assert re.search(r"clusters in each layer, is a file of [\d,]+ bytes$", error)
    assert not (tmp_path / "export.json").exists()


def test_fine_tuning_takes_the_flagfile(exported, run_folder, run_forked, tmp_path):
    output, _ = exported
    outcome = run_forked(
        "train/main.py",
        f"--workdir={tmp_path / 'run'}",
        f"--init_from={run_folder}",
        f"--flagfile={output / 'fit.flags'}",
        *("--dataset=digits", "--novalidation", "--quantize=clusterqat", "--epochs=1", "--batch_size=256"),
    )
    assert outcome.status == 0, outcome.stderr[-3000:]
    record = json.loads((output / "export.json").read_text())
    model = runs.load_model(tmp_path / "run")
    layers = {layer.name: layer for layer in model.layers if isinstance(layer, QuantizedLayer)}
    for entry in record["files"][0]["fit"]["layers"]:
        codes = layers[entry["layer"]].get_quantized_kernel().codes
        columns = codes.reshape(-1, codes.shape[-1]).T if entry["granularity"] == "per_channel" else [codes]
        assert max(len(np.unique(column)) for column in columns) <= entry["clusters"]
