"""The main job as a user runs it: train, be interrupted, continue, export, and run the file."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tf_keras as keras
from helpers.random_weights import relative_error

from tf_repvgg import runs, tflite
from tf_repvgg.fusion import fuse

EPOCHS = 8
STEPS_PER_EPOCH = 10  # in the 1,293 images that are left for training, in batches of 128
FLAGS = [
    "--flagfile=configs/digits_oabn.flags",
    f"--epochs={EPOCHS}",  # overrides the flagfile
    "--batch_size=128",
    "--validation",
]


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def kill_after(epochs, workdir, command, root):
    """Starts a training, kills it without warning once that many epochs are checkpointed."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / f"ckpt-{epochs * STEPS_PER_EPOCH}").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, run_forked, request):
    """A run that was killed after two epochs and continued by the same command."""
    root = request.config.rootpath
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train/main.py", *FLAGS, f"--workdir={workdir}"]
    kill_after(2, workdir, command, root)
    assert not (workdir / "model.keras").exists()
    assert not (workdir / "result.json").exists()
    interrupted = metrics(workdir)
    assert 2 <= len(interrupted) < EPOCHS
    result = run_forked(*command)
    assert result.status == 0, result.stderr[-3000:]
    return workdir, interrupted, result


def test_an_interrupted_run_continues(trained):
    workdir, interrupted, result = trained
    after = metrics(workdir)
    assert [entry["epoch"] for entry in after] == list(range(1, EPOCHS + 1))
    assert after[:2] == interrupted[:2]
    assert f"epoch {EPOCHS}/{EPOCHS}" in result.stderr  # the progress bar
    assert "epoch 1/" not in result.stderr
    assert all(np.isfinite(entry["loss"]) for entry in after)
    assert after[-1]["loss"] < after[0]["loss"]
    assert after[-1]["val_top1_percent"] > 80


def test_what_a_run_leaves(trained):
    workdir, _, result = trained
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        "config.flags",
        "input.json",
        "model.keras",
        "result.json",
    }
    record = json.loads((workdir / "result.json").read_text())
    assert record["split"] == "validation"
    assert record["images"] == 144 or record["images"] == 143
    assert record["top1_percent"] > 80
    assert record["training_seconds"] == pytest.approx(sum(entry["seconds"] for entry in metrics(workdir)), abs=0.2)
    assert record["machine"]["tensorflow"]
    assert f"{record['top1_percent']:.2f} %" in result.stdout
    assert json.loads((workdir / "input.json").read_text()) == {
        "dataset": "digits",
        "validation_held_out": True,
        "size": [8, 8],
        "mean": 128.0,
        "std": 128.0,
        "resize_shorter_side": None,
        "labels": [str(digit) for digit in range(10)],
    }
    assert list((workdir / "tensorboard").rglob("events.out.tfevents.*"))
    # The distribution of gamma/sigma is printed, and no channel exceeds the limit.
    assert "gamma/sigma" in result.stdout
    model = runs.load_model(workdir)
    for block in model.layers:
        norm = getattr(block, "norm_identity", None)
        if norm is not None:
            ratio = np.abs(norm.effective_gamma()) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
            assert np.max(ratio) <= 0.1 * (1 + 1e-6)


def test_config_reruns_the_same_run(trained, run_forked, tmp_path):
    """config.flags alone gives the same run; with mixed precision and a start from the first run, another one."""
    workdir, _, _ = trained
    again = tmp_path / "again"
    overrides = ["--epochs=1", f"--init_from={workdir}", "--precision=mixed_bfloat16", "--label_smoothing=0.1"]
    result = run_forked("train/main.py", f"--flagfile={workdir}/config.flags", *overrides, f"--workdir={again}")
    assert result.status == 0, result.stderr[-3000:]
    before = set((workdir / "config.flags").read_text().splitlines())
    after = set((again / "config.flags").read_text().splitlines())
    assert after - before == {*overrides}
    assert "--norm=oabn" in before & after and "--validation" in before & after
    (entry,) = metrics(again)
    assert entry["loss"] < metrics(workdir)[0]["loss"]  # it started from trained weights
    result = json.loads((again / "result.json").read_text())
    assert result["top1_percent"] > 70
    # What is saved computes in float32, whatever the training did.
    model = runs.load_model(again)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    fuse(model)


def test_evaluation_only_needs_no_more_than_a_model(trained, run_forked, tmp_path):
    workdir, _, _ = trained
    (tmp_path / "model.keras").write_bytes((workdir / "model.keras").read_bytes())
    result = run_forked("train/main.py", "--evaluate_only", "--novalidation", f"--workdir={tmp_path}")
    assert result.status == 0, result.stderr[-3000:]
    match = re.search(r"top-1 on the test split \(360 images\): ([\d.]+) %", result.stdout)
    assert float(match[1]) > 80
    assert os.listdir(tmp_path) == ["model.keras"]


@pytest.fixture(scope="module")
def exported(trained, run_forked):
    workdir, _, _ = trained
    result = run_forked(
        "export/main.py",
        f"--workdir={workdir}",
        "--weight_bits=8,4",
        "--granularity=per_tensor,per_channel",
        "--latency_runs=50",
        "--threads=2",
    )
    assert result.status == 0, result.stderr[-3000:]
    return workdir / "export", result


def test_export_leaves_its_files_and_numbers(exported):
    folder, result = exported
    report = json.loads((folder / "export.json").read_text())
    assert (report["evaluation_split"], report["images"], report["inference_type"]) == ("test", 360, "int8")
    assert report["calibration"] == "first 512 images of train"
    assert "data_dir" not in report["flags"]  # for other machines too
    assert [(entry["weight_bits"], entry["granularity"]) for entry in report["files"]] == [
        (8, "per_tensor"),
        (8, "per_channel"),
        (4, "per_tensor"),
        (4, "per_channel"),
    ]
    others = {"export.json", "predictions.npz", ".lock"}
    assert {entry["file"] for entry in report["files"]} | others == set(os.listdir(folder))
    with np.load(folder / "predictions.npz") as classes:
        for entry in report["files"]:
            right = classes[entry["file"]] == classes["labels"]
            assert len(right) == 360 and round(100 * float(np.mean(right)), 3) == entry["top1_percent"]
    for entry in report["files"]:
        assert entry["file_bytes"] == (folder / entry["file"]).stat().st_size
        assert 0 < entry["latency_ms_p50"] <= entry["latency_ms_p90"]
        assert (entry["latency_runs"], entry["latency_threads"]) == (50, 2)
        assert entry["operators"] == {"CONV_2D": 7, "MEAN": 1, "FULLY_CONNECTED": 1}
        assert entry["file"] in result.stdout
    assert len(report["outliers"]) == 8
    assert "machine" in report


def test_integer_files_keep_the_accuracy(exported):
    folder, _ = exported
    report = json.loads((folder / "export.json").read_text())
    float_top1 = report["float_training_form_top1_percent"]
    assert float_top1 > 80
    assert report["float_fused_top1_percent"] == pytest.approx(float_top1, abs=0.3)
    for entry in report["files"][:2]:
        assert entry["top1_percent"] > max(80, float_top1 - 3)
        assert entry["agreement_with_float_percent"] > 95


def test_export_with_another_ptq_method(trained, run_forked, tmp_path):
    workdir, _, _ = trained
    result = run_forked(
        "export/main.py",
        f"--workdir={workdir}",
        f"--output={tmp_path}",
        "--ptq=equalize+adaquant",
        "--ptq_iterations=60",
        "--weight_bits=4",
        "--layer_bits=stem=8,logits=8",
        "--granularity=per_tensor",
        "--latency_runs=50",
    )
    assert result.status == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "export.json").read_text())
    (entry,) = report["files"]
    assert entry["file"] == "int8_w4_per_tensor_equalize_adaquant.tflite"
    assert (entry["ptq"], entry["layer_bits"]) == ("equalize+adaquant", "stem=8,logits=8")
    assert entry["quantization_seconds"] > 0
    assert entry["operators"] == {"CONV_2D": 7, "MEAN": 1, "FULLY_CONNECTED": 1}
    assert entry["top1_percent"] > report["float_fused_top1_percent"] - 5
    codes = tflite.weight_codes((tmp_path / entry["file"]).read_bytes())
    largest = [int(np.max(np.abs(kernel.codes.astype(int)))) for kernel in codes]
    assert largest[0] > 7 and largest[-1] > 7 and max(largest[1:-1]) <= 7


def test_an_export_that_failed_late_goes_on(trained, run_forked, tmp_path):
    """Quantized files are kept for the same settings, not for others, and removed in the end."""
    workdir, _, _ = trained

    def export(*arguments):
        command = ["export/main.py", f"--workdir={workdir}", f"--output={tmp_path}", "--ptq=bias_tune"]
        return run_forked(*command, "--weight_bits=4,5", "--ptq_iterations=8", "--latency_runs=0", *arguments)

    def list_finished_work():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".unfinished").iterdir()}

    names = [f"int8_w{bits}_per_channel_bias_tune.tflite" for bits in (4, 5)]
    outcome = export("--targets=litert_int4")
    assert outcome.status == 2 and "target litert_int4: no weights fit into 4 bits" in outcome.stderr
    first = list_finished_work()
    assert first.keys() == {f"{name}.{suffix}" for name in names for suffix in ("json", "bin")}
    assert not (tmp_path / "export.json").exists()
    assert export("--targets=litert_int4", "--ptq_seed=1").status == 2
    second = list_finished_work()
    assert second.keys() == first.keys() and all(second[name] > first[name] for name in first)
    outcome = export("--ptq_seed=1")
    assert outcome.status == 0, outcome.stderr[-3000:]
    lines = [line for line in outcome.stderr.splitlines() if line.endswith("taken from the run that was interrupted")]
    assert [line.partition(":")[0] for line in lines] == names
    assert not (tmp_path / ".unfinished").exists()
    report = json.loads((tmp_path / "export.json").read_text())
    for entry in report["files"]:
        codes = tflite.weight_codes((tmp_path / entry["file"]).read_bytes())
        assert max(np.max(np.abs(kernel.codes.astype(int))) for kernel in codes) == 2 ** (entry["weight_bits"] - 1) - 1
        assert entry["quantization_seconds"] > 0 and "latency_ms_p50" not in entry
        assert entry["top1_percent"] > 80


def test_export_without_images(trained, run_forked, tmp_path):
    workdir, _, _ = trained
    command = ["export/main.py", f"--workdir={workdir}", f"--output={tmp_path}", "--ptq=dfq_data_free"]
    outcome = run_forked(*command, "--latency_runs=0")
    assert outcome.status == 0, outcome.stderr[-3000:]
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["calibration"] == "statistics of the normalizations, no images"
    assert report["files"][0]["top1_percent"] > report["float_fused_top1_percent"] - 3


def test_reported_numbers_are_those_of_the_files(exported, trained, digits_test_split):
    """Without export/main.py: the model from its file, fused here, and each written file in the interpreter."""
    folder, _ = exported
    workdir, _, _ = trained
    report = json.loads((folder / "export.json").read_text())
    images, labels = digits_test_split
    model = runs.load_model(workdir)
    fused = fuse(model)
    assert relative_error(model(images), fused(images)) < 1e-4
    float_classes = fused(images).numpy().argmax(axis=1)
    assert 100 * np.mean(float_classes == labels) == pytest.approx(report["float_fused_top1_percent"], abs=0.3)
    for entry in report["files"]:
        file = (folder / entry["file"]).read_bytes()
        classes = tflite.predict(file, images).argmax(axis=1)
        assert 100 * np.mean(classes == labels) == pytest.approx(entry["top1_percent"], abs=0.01)
        codes = tflite.weight_codes(file)
        assert max(np.max(np.abs(kernel.codes.astype(int))) for kernel in codes) == 2 ** (entry["weight_bits"] - 1) - 1
        assert {len(kernel.scale) for kernel in codes} == (
            {1} if entry["granularity"] == "per_tensor" else {16, 32, 64, 10}
        )


def test_session_model_is_in_training_form(trained_digits):
    assert isinstance(trained_digits, keras.Model)
    assert any(hasattr(layer, "norm_identity") for layer in trained_digits.layers)
