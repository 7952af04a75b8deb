"""train/main.py on two devices and as two workers: the training of one process, and what interrupts or ends it."""

import json
import os
import re
import signal
import socket

import numpy as np
import pytest
from helpers.workers import Workers, find_free_ports, make_config

from tf_repvgg import runs
from tf_repvgg.training.cluster import Cluster

pytestmark = pytest.mark.usefixtures("digits")

# With the last batch of an epoch, of which one replica has an image more, and with validation data.
TRAIN = [
    "--epochs=1",
    "--batch_size=192",
    "--learning_rate=0.01",
    "--norm=oabn",
    "--synchronized_bn",
    "--nodrop_remainder",
    "--ema=0.9",
]
FINE_TUNE = [
    "--quantize=float",
    "--epochs=2",
    "--steps_per_epoch=4",
    "--batch_size=64",
    "--learning_rate=0.01",
    "--deterministic",
    "--checkpoint_minutes=1e-9",  # after every step but the last two of an epoch
]
MIRRORED = """
import runpy
import tensorflow as tf
import tf_repvgg

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
runpy.run_path("train/main.py", run_name="__main__")
"""


def read_metrics(workdir):
    (record,) = map(json.loads, (workdir / runs.METRICS_NAME).read_text().splitlines())
    del record["seconds"]
    return record


def assert_same_training(workdir, expected_workdir):
    """Weights and metrics of one epoch, within what the order of sums may change."""
    model, expected_model = runs.load_model(workdir), runs.load_model(expected_workdir)
    for actual, expected in zip(model.weights, expected_model.weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3, err_msg=actual.name)
    metrics, expected_metrics = read_metrics(workdir), read_metrics(expected_workdir)
    assert metrics.keys() == expected_metrics.keys() >= {"loss", "val_loss", "val_top1_percent"}
    for name, value in expected_metrics.items():
        atol = 1.0 if name.endswith("percent") else 0.0  # an image or two
        np.testing.assert_allclose(metrics[name], value, rtol=2e-3, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def single(tmp_path_factory, run_forked):
    """A run of one process on one device."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    outcome = run_forked("train/main.py", *TRAIN, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.stderr[-3000:]
    return workdir


def test_mirrored_training_is_that_of_one_device(single, run_forked, tmp_path):
    (tmp_path / "mirrored.py").write_text(MIRRORED)
    command = [*TRAIN, "--strategy=mirrored", f"--workdir={tmp_path / 'run'}"]
    outcome = run_forked(tmp_path / "mirrored.py", *command, import_from="train")
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert_same_training(tmp_path / "run", single)


def test_two_workers_train_like_one_process(single, forked_programs, tmp_path):
    workers = Workers(forked_programs, tmp_path, [[*TRAIN, f"--workdir={tmp_path / 'run'}"]] * 2)
    statuses, errors = workers.wait()
    assert statuses == [0, 0] and errors[1] == [], errors
    assert_same_training(tmp_path / "run", single)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(single))


def test_interrupted_workers_continue_to_the_same_bits(single, forked_programs, tmp_path):
    """SIGTERM to one of them saves; a kill loses what came after the last checkpoint."""

    def start(workdir):
        command = [*FINE_TUNE, f"--init_from={single}", f"--workdir={workdir}"]
        return Workers(forked_programs, tmp_path / "output", [command] * 2)

    workdir, uninterrupted = tmp_path / "interrupted", tmp_path / "uninterrupted"
    assert start(uninterrupted).wait()[0] == [0, 0]
    workers = start(workdir)
    workers.signal_at(workdir / "checkpoints" / "ckpt-1", signal.SIGTERM, 1)
    statuses, errors = workers.wait()
    assert statuses == [143, 143], errors
    assert all("error: terminated; files written earlier are intact" in lines[-1] for lines in errors), errors
    workers = start(workdir)
    workers.signal_at(workdir / "checkpoints" / "ckpt-5", signal.SIGKILL, 1)
    statuses, (lines, _) = workers.wait()
    assert statuses == [1, -signal.SIGKILL], lines
    assert re.search(r"main.py: error: lost worker 1 \(127.0.0.1:\d+\); start the same command", lines[-1]), lines
    assert not (workdir / runs.MODEL_NAME).exists()
    assert start(workdir).wait()[0] == [0, 0]
    for actual, expected in zip(runs.load_model(workdir).weights, runs.load_model(uninterrupted).weights, strict=True):
        np.testing.assert_array_equal(actual, expected)


def read_refusals(workers):
    """The only line of each worker, which must have ended with exit status 2."""
    statuses, errors = workers.wait()
    assert statuses == [2] * len(errors), errors
    assert all(len(lines) == 1 and lines[0].startswith("train/main.py: error: ") for lines in errors), errors
    return [lines[0] for lines in errors]


def test_differing_flags_are_refused_by_all(forked_programs, tmp_path):
    commands = [[*TRAIN, f"--workdir={tmp_path / 'run'}", f"--momentum={momentum}"] for momentum in (0.9, 0.8)]
    message = "has another value of momentum (flags) than the chief: --momentum=0.8 instead of --momentum=0.9"
    for line in read_refusals(Workers(forked_programs, tmp_path, commands)):
        assert message in line
    assert not (tmp_path / "run").exists()


def test_clusterqat_is_refused_by_all_workers(single, forked_programs, tmp_path):
    command = ["--quantize=clusterqat", f"--init_from={single}", f"--workdir={tmp_path / 'run'}"]
    for line in read_refusals(Workers(forked_programs, tmp_path, [command] * 2)):
        assert "--quantize=clusterqat trains in one process only" in line
    assert not (tmp_path / "run").exists()


def test_an_unreachable_worker_is_named(forked_programs, tmp_path):
    """Only one of two workers is started."""
    ports = find_free_ports(2)
    command = [*TRAIN, f"--workdir={tmp_path / 'run'}", "--connect_seconds=1"]
    (line,) = read_refusals(Workers(forked_programs, tmp_path, [command], [make_config(ports, 1)]))
    assert f"worker 0 (127.0.0.1:{ports[0]}) did not answer within --connect_seconds=1; start the same" in line
    assert not (tmp_path / "run").exists()


def test_workers_with_different_clusters_are_refused(forked_programs, tmp_path):
    """One knows of two workers, the other of three."""
    ports = find_free_ports(3)
    command = [*TRAIN, f"--workdir={tmp_path / 'run'}", "--connect_seconds=10"]
    configs = [make_config(ports[:2], 0), make_config(ports, 1)]
    for index, line in enumerate(read_refusals(Workers(forked_programs, tmp_path, [command] * 2, configs))):
        assert f"worker {1 - index} (127.0.0.1:{ports[1 - index]}) has another cluster or index in TF_CONFIG" in line
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused(forked_programs, tmp_path):
    with socket.create_server(("", 0)) as server:
        ports = [server.getsockname()[1], *find_free_ports(1)]
        command = [*TRAIN, f"--workdir={tmp_path / 'run'}"]
        (line,) = read_refusals(Workers(forked_programs, tmp_path, [command], [make_config(ports, 0)]))
    assert f"worker 0 (127.0.0.1:{ports[0]}) cannot listen on port {ports[0]} of 127.0.0.1 (Address already" in line


TASK = '"task": {"type": "worker", "index": 0}'


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "TF_CONFIG is not set; give every worker its own: TF_CONFIG="),
        ("{", "TF_CONFIG is damaged: it is not JSON"),
        ('{"cluster": {"worker": []}, ' + TASK + "}", "cluster.worker is \\[\\], but"),
        ('{"cluster": {"worker": ["host"]}, ' + TASK + "}", "cluster.worker.* is 'host', but"),
        ('{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, ' + TASK + "}", "cluster has 'ps', but all processes train"),
        ('{"cluster": {"worker": ["a:1"]}}', "task is missing; it should be like"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "task.type is 'chief'; it must be"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "has 1 addresses; give 0 to 0"),
        ('{"cluster": {"worker": ["a:1", "a:1"]}, ' + TASK + "}", "has the address 'a:1' twice"),
    ],
)
def test_a_wrong_tf_config_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Cluster.read(text)
