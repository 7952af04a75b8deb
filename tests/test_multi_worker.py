"""train/main.py as two workers on this machine: the same training as one process, and what ends it."""

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

TRAIN = [
    "--flagfile=configs/digits_oabn.flags",
    "--epochs=2",
    "--steps_per_epoch=5",
    "--batch_size=64",
    "--learning_rate=0.01",
    "--synchronized_bn",
    "--deterministic",
    "--ema=0.9",
    "--checkpoint_minutes=1e-9",  # after every step but the last two of an epoch
]


def read_weights(workdir):
    return runs.load_model(workdir).get_weights()


def read_losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start_pair(forked_programs, tmp_path):
    """start_pair(workdir) -> Workers."""
    return lambda workdir: Workers(forked_programs, tmp_path / "output", [[*TRAIN, f"--workdir={workdir}"]] * 2)


def test_two_workers_train_like_one_process_however_they_are_interrupted(start_pair, tmp_path, run_forked):
    """SIGTERM to one saves; a kill loses what came after the last checkpoint; both continue to the same bits."""
    single, pair, interrupted = tmp_path / "single", tmp_path / "pair", tmp_path / "interrupted"
    outcome = run_forked("train/main.py", *TRAIN, f"--workdir={single}")
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert start_pair(pair).wait()[0] == [0, 0]
    assert sorted(os.listdir(pair)) == sorted(os.listdir(single))
    np.testing.assert_allclose(read_losses(pair), read_losses(single), rtol=1e-5)
    for actual, expected in zip(read_weights(pair), read_weights(single), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)

    workers = start_pair(interrupted)
    workers.signal_at(interrupted / "checkpoints" / "ckpt-1", signal.SIGTERM, 1)
    statuses, errors = workers.wait()
    assert statuses == [143, 143], errors
    assert all("error: terminated; files written earlier are intact" in lines[-1] for lines in errors), errors
    workers = start_pair(interrupted)
    workers.signal_at(interrupted / "checkpoints" / "ckpt-6", signal.SIGKILL, 1)
    statuses, (lines, _) = workers.wait()
    assert statuses == [1, -signal.SIGKILL], lines
    assert re.search(r"main.py: error: lost worker 1 \(127.0.0.1:\d+\); start the same command on all", lines[-1]), (
        lines
    )
    assert not (interrupted / runs.MODEL_NAME).exists()
    assert start_pair(interrupted).wait()[0] == [0, 0]
    for actual, expected in zip(read_weights(interrupted), read_weights(pair), strict=True):
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
