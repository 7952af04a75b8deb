"""Fine-tuning with quantization from the command line: the exported file computes what was trained."""

import json
import shutil

import numpy as np
import pytest
import tf_keras as keras

from tf_repvgg import runs, tflite
from tf_repvgg.models import Variant, build_repvgg
from tf_repvgg.quantization import QuantizedLayer, quantizers

FLAGS = ("--novalidation", "--crop_padding=1", "--batch_size=32", "--learning_rate=0.001", "--weight_decay=0")


@pytest.fixture(scope="module")
def float_run(tmp_path_factory, trained_digits, digits):
    folder = tmp_path_factory.mktemp("runs") / "float"
    folder.mkdir()
    trained_digits.save(folder / runs.MODEL_NAME)
    (folder / runs.INPUT_NAME).write_text(json.dumps(digits.metadata()))
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, digits):
    """Two blocks in training form with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    keras.utils.set_random_seed(0)
    variant = Variant(8, (8,), (1,), stem_stride=2, strides=(1,))
    build_repvgg(variant, (8, 8, 1), 10, norm="oabn").save(folder / runs.MODEL_NAME)
    (folder / runs.INPUT_NAME).write_text(json.dumps(digits.metadata()))
    return folder


@pytest.fixture(scope="module")
def clustered_run(run_forked, float_run, tmp_path_factory):
    """Three bits, with a teacher, frozen at the end."""
    folder = tmp_path_factory.mktemp("runs") / "clustered"
    result = run_forked(
        "train/main.py",
        *FLAGS,
        f"--workdir={folder}",
        f"--init_from={float_run}",
        f"--distill_from={float_run}",
        "--quantize=clusterqat",
        "--number_of_clusters=logits=256,.*=8",
        "--ptq_start=codebook_adaquant",
        "--epochs=2",
        "--freeze_epochs=0.5",
    )
    assert result.status == 0, result.stderr[-3000:]
    return folder


def test_a_run_writes_a_quantized_model(clustered_run):
    model = keras.models.load_model(clustered_run / runs.MODEL_NAME)
    layers = [layer for layer in model.layers if isinstance(layer, QuantizedLayer)]
    counts = [len(np.unique(layer.get_quantized_kernel().codes)) for layer in layers]
    assert max(counts[:-1]) <= 8 < counts[-1] <= 255
    assert quantizers(model)
    assert "--quantize=clusterqat" in (clustered_run / runs.CONFIG_NAME).read_text().split()
    assert json.loads((clustered_run / "result.json").read_text())["top1_percent"] > 93


def test_the_exported_file_is_the_trained_model(clustered_run, run_forked, digits):
    result = run_forked("export/main.py", f"--workdir={clustered_run}")
    assert result.status == 0, result.stderr[-3000:]
    report = json.loads((clustered_run / "export" / "export.json").read_text())
    (entry,) = report["files"]
    assert entry["agreement_with_trained_model_percent"] >= 99
    assert abs(entry["top1_percent"] - report["trained_model_top1_percent"]) <= 0.6  # two of 360 images
    assert "quantized, as trained" in result.stdout
    assert report["calibration"] == "as trained"
    model = keras.models.load_model(clustered_run / runs.MODEL_NAME)
    codes = [layer.get_quantized_kernel().codes for layer in model.layers if isinstance(layer, QuantizedLayer)]
    file = (clustered_run / "export" / entry["file"]).read_bytes()
    for expected, kernel in zip(codes, tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(kernel.codes.ravel(), expected.ravel())


def test_the_float_reference(float_run, run_forked, tmp_path):
    """The same steps without quantization. The run can be exported, quantized further, and used as a teacher."""
    command = ("train/main.py", *FLAGS, f"--workdir={tmp_path}", f"--init_from={float_run}", "--quantize=float")
    result = run_forked(*command, "--epochs=1")
    assert result.status == 0, result.stderr[-3000:]
    result = run_forked("export/main.py", f"--workdir={tmp_path}", "--weight_bits=6")
    assert result.status == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "export" / "export.json").read_text())
    assert report["float_fused_top1_percent"] > 93
    assert "float_training_form_top1_percent" not in report
    assert report["files"][0]["agreement_with_float_percent"] > 95
    command = ("train/main.py", *FLAGS, f"--workdir={tmp_path / 'student'}", f"--distill_from={tmp_path}")
    assert run_forked(*command, "--epochs=1", "--steps_per_epoch=1").status == 0


def test_tfmot_in_two_runs(float_run, run_forked, tmp_path):
    """Clustering, then quantization that preserves the clusters; the result is exported like any other."""
    for name, init_from, *options in (
        ("clustering", float_run, "--quantize=tfmot_clustering", "--number_of_clusters=8"),
        ("quantization", tmp_path / "clustering", "--quantize=tfmot_quantization", f"--distill_from={float_run}"),
    ):
        command = ("train/main.py", *FLAGS, f"--workdir={tmp_path / name}", f"--init_from={init_from}", *options)
        result = run_forked(*command, "--epochs=1")
        assert result.status == 0, result.stderr[-3000:]
    clustered = keras.models.load_model(tmp_path / "clustering" / runs.MODEL_NAME)
    # Depending on the machine, some clusters end without weights.
    assert 4 <= max(len(np.unique(layer.kernel)) for layer in clustered.layers if hasattr(layer, "kernel")) <= 8
    result = run_forked("export/main.py", f"--workdir={tmp_path / 'quantization'}")
    assert result.status == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "quantization" / "export" / "export.json").read_text())
    assert report["files"][0]["agreement_with_trained_model_percent"] >= 99
    assert report["files"][0]["weights"] == "as trained"


def test_in_training_form(tmp_path, run_forked, small_run):
    """The branches train; with 16-bit activations, the file has int16 inputs and outputs."""
    result = run_forked(
        "train/main.py",
        *FLAGS,
        f"--workdir={tmp_path / 'run'}",
        f"--init_from={small_run}",
        "--quantize=clusterqat",
        "--batch_norm_statistics=running",
        "--activation_bits=16",
        "--epochs=1",
        "--steps_per_epoch=5",
    )
    assert result.status == 0, result.stderr[-3000:]
    result = run_forked("export/main.py", f"--workdir={tmp_path / 'run'}")
    assert result.status == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "export" / "export.json").read_text())
    assert report["inference_type"] == "int16"
    assert report["files"][0]["agreement_with_trained_model_percent"] >= 99


def test_learned_steps_start_from_adaquant(float_run, run_forked, tmp_path):
    result = run_forked(
        "train/main.py",
        *FLAGS,
        f"--workdir={tmp_path}",
        f"--init_from={float_run}",
        "--quantize=lsq",
        "--weight_bits=3",
        "--ptq_start=adaquant",
        "--calibration_images=64",
        "--epochs=1",
        "--steps_per_epoch=2",
        "--learning_rate=1e-6",
    )
    assert result.status == 0, result.stderr[-3000:]
    model = keras.models.load_model(tmp_path / runs.MODEL_NAME)
    codes = [layer.get_quantized_kernel().codes for layer in model.layers if isinstance(layer, QuantizedLayer)]
    # AdaQuant's grid is symmetric, and two steps at such a rate change no code.
    assert min(np.min(array) for array in codes) == -3 and max(np.max(array) for array in codes) == 3
    assert json.loads((tmp_path / "result.json").read_text())["top1_percent"] > 90


@pytest.mark.parametrize(
    "options",
    [
        ["--train_centroids", "--centroid_update_steps=3", "--ramp_epochs=1.5"],
        ["--ptq_start=codebook_adaquant", "--calibration_images=32"],
    ],
    ids=["trained centroids", "from PTQ"],
)
def test_killed_and_resumed(small_run, run_forked, tmp_path, options):
    """The weights are those of an uninterrupted run: clusters, ranges and counters are in the checkpoint."""
    command = [
        "train/main.py",
        *FLAGS,
        f"--init_from={small_run}",
        "--quantize=clusterqat",
        "--epochs=2",
        "--steps_per_epoch=8",
        "--deterministic",
        *options,
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcome = run_forked(*command, f"--workdir={whole}")
    assert outcome.status == 0, outcome.stderr[-3000:]
    folder = killed / "checkpoints"
    kill = {"folder": str(folder), "event": 12, "seconds": 0}
    assert run_forked(*command, f"--workdir={killed}", kill=kill).status != 0
    assert list(folder.glob("ckpt-*")) and not (killed / runs.MODEL_NAME).exists()
    resumed = run_forked(*command, f"--workdir={killed}")
    assert resumed.status == 0 and "AdaQuant" not in resumed.stderr
    expected, actual = (keras.models.load_model(path / runs.MODEL_NAME).get_weights() for path in (whole, killed))
    for expected_weight, actual_weight in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(actual_weight, expected_weight)
    shutil.rmtree(whole)
