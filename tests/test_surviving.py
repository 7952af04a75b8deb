"""Runs that survive: SIGKILL, full disks, diverging weights, and other processes in the same folder.

Eight kills by default; `python -m pytest tests/test_surviving.py --kills=200` kills more often. A fault at every write
is in tests/test_reliability.py.
"""

import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import tensorflow as tf

from tf_repvgg import runs, storage

# Otherwise the first program prints that TFDS prepares the set, beside what the tests expect.
pytestmark = pytest.mark.usefixtures("digits")

TRAIN = [
    "train/main.py",
    "--flagfile=configs/digits_oabn.flags",
    "--epochs=3",
    "--batch_size=256",
    "--deterministic",
    "--checkpoint_minutes=1e-9",  # after every step but the last two of an epoch
]
EXPORT = ["export/main.py", "--weight_bits=8,4", "--latency_runs=50", "--calibration_images=64"]


def names(folder):
    """Relative paths of all files and folders but TensorBoard's files, of which every process starts a new one."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}


def metrics(workdir):
    """The records of metrics.jsonl without the seconds."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_weights(workdir, expected_workdir):
    weights, expected = (runs.load_model(path).weights for path in (workdir, expected_workdir))
    assert len(weights) > 50
    for weight, expected_weight in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(weight, expected_weight, err_msg=weight.name)


def assert_succeeds(outcome):
    assert outcome.status == 0, outcome.stderr[-3000:]


def read_error(outcome, status):
    """The line that a program prints when it fails; only a progress bar may come before it."""
    assert outcome.status == status, outcome.stderr[-3000:]
    *bars, error = outcome.stderr.splitlines()
    assert all("step" in bar or "layer" in bar for bar in bars if bar.strip()), outcome.stderr[-3000:]
    assert "main.py: error: " in error
    return error


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run_forked):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert_succeeds(run_forked(*TRAIN, f"--workdir={workdir}"))
    assert_succeeds(run_forked(*EXPORT, f"--workdir={workdir}"))
    return workdir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, run_forked, pytestconfig):
    """(workdir, number of kills): the same commands, killed at random moments and started again until they are done."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    random = np.random.default_rng(0)
    kills = 0

    def run_and_kill(command, folder, last_event):
        """Kills a command up to 2 s after its start, at a random touch of a folder, or up to 100 ms after that."""
        event = random.integers(1, last_event)
        event, delay = [(1, random.uniform(0, 2)), (event, 0), (event, random.uniform(0, 0.1))][random.integers(3)]
        kill = {"folder": str(folder), "event": int(event), "seconds": float(delay)}
        status = run_forked(*command, f"--workdir={workdir}", kill=kill).status
        assert status in (0, -signal.SIGKILL)
        return status == -signal.SIGKILL

    expected_kills = pytestconfig.getoption("kills")
    while kills < 0.6 * expected_kills:
        kills += run_and_kill(TRAIN, workdir, 60)
    assert_succeeds(run_forked(*TRAIN, f"--workdir={workdir}"))
    while kills < expected_kills:
        kills += run_and_kill(EXPORT, workdir / "export", 30)
    assert_succeeds(run_forked(*EXPORT, f"--workdir={workdir}"))
    return workdir, kills


def test_kills_do_not_change_the_result_of_a_run(uninterrupted, interrupted, pytestconfig):
    workdir, kills = interrupted
    assert kills >= pytestconfig.getoption("kills")
    assert_same_weights(workdir, uninterrupted)
    assert metrics(workdir) == metrics(uninterrupted)
    assert names(workdir) == names(uninterrupted)
    for path in (*(uninterrupted / "export").glob("*.tflite"), uninterrupted / "input.json"):
        assert (workdir / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes()
    for name in ("result.json", "export/export.json"):
        record, expected = (json.loads((folder / name).read_text()) for folder in (workdir, uninterrupted))
        assert record.keys() == expected.keys()
    assert record["float_training_form_top1_percent"] == expected["float_training_form_top1_percent"]


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kibibytes) -> folder of a file system of that size; further calls resize it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}k", *options)), "tmpfs", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine does not let the test mount a small disk: {getattr(error, 'stderr', error)}")

    mount(64)
    yield lambda size: mount(size, "remount") or folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_while_training(small_disk, uninterrupted, run_forked):
    """There is room for one checkpoint only; with more room, the same command continues from it."""
    workdir = small_disk(1100) / "run"
    command = [*TRAIN, f"--workdir={workdir}"]
    line = read_error(run_forked(*command), 1)
    assert (
        f"cannot write '{workdir}/checkpoints/ckpt-2' (No space left on device); files written earlier are intact"
        in line
    )
    assert not (workdir / "model.keras").exists()
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert checkpoint.name == "ckpt-1"
    small_disk(8000)
    assert_succeeds(run_forked(*command))
    assert_same_weights(workdir, uninterrupted)
    assert metrics(workdir) == metrics(uninterrupted)


def test_full_disk_while_exporting(small_disk, uninterrupted, run_forked):
    output = small_disk(64)
    earlier = {"int8_w8_per_channel.tflite": b"an earlier export", "export.json": b"{}"}
    for name, content in earlier.items():
        (output / name).write_bytes(content)
    line = read_error(run_forked(*EXPORT, f"--workdir={uninterrupted}", f"--output={output}"), 1)
    assert "int8_w8_per_channel.tflite" in line and "No space left on device" in line
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.suffix} == earlier


def test_busy_folders_are_refused(run_forked, tmp_path, uninterrupted):
    """This process claims them; the lock file of a process that has ended does not count."""
    for name in ("training", "output", "abandoned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").write_text("1\n")
    assert storage.lock_holder(tmp_path / "abandoned") is None
    for name in ("training", "output"):
        storage.claim_folder(tmp_path / name)
        assert storage.lock_holder(tmp_path / name) == str(os.getpid())
    workdir = tmp_path / "training"
    busy = f"is in use by process {os.getpid()};"
    assert busy in read_error(run_forked(*TRAIN, f"--workdir={workdir}"), 2)
    assert busy in read_error(run_forked(*EXPORT, f"--workdir={uninterrupted}", f"--output={tmp_path / 'output'}"), 2)
    (workdir / "input.json").write_bytes((uninterrupted / "input.json").read_bytes())
    assert f"process {os.getpid()} is training it" in read_error(run_forked(*EXPORT, f"--workdir={workdir}"), 2)
    assert names(workdir) == {".lock", "input.json"}


def test_diverging_weights_end_a_run(run_forked, tmp_path):
    workdir = tmp_path / "run"
    command = [*TRAIN, "--learning_rate=1e30", f"--workdir={workdir}"]
    line = read_error(run_forked(*command), 3)
    assert "at step 3; " in line
    assert f"continue from {workdir}/checkpoints/ckpt-2 and diverge again" in line
    assert "try a lower --learning_rate in a new workdir" in line
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"ckpt-1", "ckpt-2"}
    for name, shape in tf.train.list_variables(str(workdir / "checkpoints" / "ckpt-2" / "state")):
        if shape:
            assert np.all(np.isfinite(tf.train.load_variable(str(workdir / "checkpoints" / "ckpt-2" / "state"), name)))
    assert not (workdir / "model.keras").exists()
    assert not (workdir / "metrics.jsonl").exists()
    assert read_error(run_forked(*command), 3) == line  # the same command fails in the same way


def test_partial_files_of_a_killed_process_are_removed(tmp_path):
    for name in (".model.keras.partial", ".ckpt-5.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    storage.write_bytes(tmp_path / "model.keras", b"whole")
    assert names(tmp_path) == {"model.keras", ".ckpt-5.partial", ".ckpt-5.partial/half"}
    storage.claim_folder(tmp_path)
    assert names(tmp_path) == {"model.keras", ".lock"}


def test_folders_are_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), storage.atomic_write(tmp_path / "run") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert names(tmp_path) == set()
    with storage.atomic_write(tmp_path / "run") as temporary:
        shutil.copytree(os.path.dirname(__file__), temporary, ignore=shutil.ignore_patterns("__pycache__"))
        assert names(tmp_path) > {".run.partial/run/conftest.py"}
    assert (tmp_path / "run" / "conftest.py").exists()
    with pytest.raises(OSError, match=r"cannot write .*gone.x' \(No such file or directory\); files written"):
        storage.write_bytes(tmp_path / "gone" / "x", b"")


REPORTING = """
import runpy
from tensorflow.python.framework import config
try:
    runpy.run_path("train/main.py", run_name="__main__")
finally:
    print("deterministic:", config.is_op_determinism_enabled())
"""


@pytest.mark.parametrize("switch", ["--deterministic", "--nodeterministic"])
def test_tensorflow_is_made_deterministic(run_forked, tmp_path, switch):
    """The setting of TensorFlow is checked: on CPUs, no two runs without it have been seen to differ."""
    (tmp_path / "reporting.py").write_text(REPORTING)
    command = (tmp_path / "reporting.py", switch, "--evaluate_only", f"--workdir={tmp_path}")
    outcome = run_forked(*command, import_from="train")
    assert "no model at" in outcome.stderr
    assert outcome.stdout == f"deterministic: {switch == '--deterministic'}\n"
