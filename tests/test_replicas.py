"""Two replicas of a network: the same variables on both after every step, and the same training as on one device."""

import json

import numpy as np
import pytest

from tf_repvgg import runs

METHODS = ("oabn", "oabn, not synchronized", "clusterqat", "clusterqat, trained centroids", "lsq", "distillation")


def test_replicas_stay_identical_and_train_like_one_device(run_program):
    """Kernels, OABN's variances and gammas, centroids, assignments, activation ranges, steps, and moving averages."""
    result = run_program("tests/helpers/replicas.py", *METHODS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [method for method in METHODS if "not synchronized" not in method]


MIRRORED = """
import runpy
import tensorflow as tf
import tf_repvgg

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
runpy.run_path("train/main.py", run_name="__main__")
"""


@pytest.mark.usefixtures("digits")
def test_mirrored_training_is_that_of_one_device(run_forked, tmp_path):
    """With the last batch of an epoch, which one replica has an image more of, and with validation data."""
    (tmp_path / "mirrored.py").write_text(MIRRORED)
    options = ["--epochs=1", "--batch_size=192", "--learning_rate=0.01", "--synchronized_bn", "--nodrop_remainder"]
    programs = {"none": "train/main.py", "mirrored": tmp_path / "mirrored.py"}
    models, records = {}, {}
    for strategy, program in programs.items():
        workdir = tmp_path / strategy
        command = (program, *options, f"--strategy={strategy}", f"--workdir={workdir}")
        outcome = run_forked(*command, import_from="train")
        assert outcome.status == 0, outcome.stderr[-3000:]
        models[strategy] = runs.load_model(workdir)
        (records[strategy],) = map(json.loads, (workdir / runs.METRICS_NAME).read_text().splitlines())
    for actual, expected in zip(models["mirrored"].weights, models["none"].weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3, err_msg=actual.name)
    assert records["mirrored"].keys() == records["none"].keys() >= {"loss", "val_loss", "val_top1_percent"}
    for name, value in records["none"].items():
        if name != "seconds":
            np.testing.assert_allclose(records["mirrored"][name], value, rtol=2e-3, err_msg=name)
