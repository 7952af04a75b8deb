"""Bad input ends a program with one clear line on stderr and exit status 2, and leaves no half-written files."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from absl import flags as absl_flags
from helpers.bad_commands import BAD_COMMANDS
from helpers.bad_training_commands import TRAIN
from PIL import Image

from tf_repvgg import cli, runs, storage
from tf_repvgg.fusion import fuse
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import ptq


@pytest.fixture(scope="module")
def here(tmp_path_factory, digits):
    """A folder with runs and files in every state that the cases need; the digits data set is prepared too."""
    folder = tmp_path_factory.mktemp("inputs")
    metadata = {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 128.0, "validation_held_out": False}

    def add_run(name, model=None, **more):
        (folder / name).mkdir()
        (folder / name / runs.INPUT_NAME).write_text(json.dumps(metadata | more))
        if model:
            model.save(folder / name / runs.MODEL_NAME)

    def copy_with_nan(model, find_weight):
        copy = keras.models.clone_model(model)
        find_weight(copy).assign(np.full(find_weight(copy).shape, np.nan))
        return copy

    model = build_repvgg("digits", (8, 8, 1), 10)
    fused = fuse(model)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1))
    add_run("run", model)
    add_run("plain_run", keras.Model(fused.inputs, fused.outputs))  # as fused before statistics were saved
    add_run("nan_run", copy_with_nan(fused, lambda copy: copy.get_layer("stem").bias))
    add_run("nan_branches_run", copy_with_nan(model, lambda copy: copy.weights[0]))
    add_run("quantized_run", ptq.quantize(fused, calibration=images))
    add_run("other_classes_run", build_repvgg("digits", (8, 8, 1), 3))
    add_run("other_labels_run", model, labels=["zero", *map(str, range(1, 10))])
    (folder / "run" / runs.CONFIG_NAME).write_text("--epochs=10\n--norm=bn\n")

    build_repvgg("cifar-s", (8, 8, 1), 10).save(folder / "other_variant.keras")
    content = (folder / "run" / runs.MODEL_NAME).read_bytes()
    (folder / "truncated.keras").write_bytes(content[: len(content) // 2])
    add_run("truncated_run")
    shutil.copy(folder / "truncated.keras", folder / "truncated_run" / runs.MODEL_NAME)
    add_run("damaged_run")
    checkpoint = folder / "damaged_run" / "checkpoints" / "ckpt-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.index").write_bytes(b"\0" * 40)
    (checkpoint / "state.data-00000-of-00001").write_bytes(b"\0" * 40)

    for name in ("damaged_run", "truncated_run"):
        (folder / name / runs.CONFIG_NAME).write_text("--block=repvgg\n")
    add_run("trained_run", model)
    for blocked in ("blocked_run/result.json", "blocked_export/export.json"):
        (folder / blocked).mkdir(parents=True)

    shutil.copytree(folder / "truncated_run", folder / "configured_run")
    (folder / "configured_run" / runs.INPUT_NAME).unlink()
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    (folder / "no_classes" / "train").mkdir(parents=True)
    for split, label in itertools.product(("train", "test"), ("cat", "dog")):
        (folder / "photos" / split / label).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "photos" / split / label / "a.png")
    (folder / "photos" / "train" / "dog" / "b.png").write_bytes(b"")
    return folder


def read_files(folder):
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input(case, here, tmp_path, run_forked):
    program, flags, *messages = BAD_COMMANDS[case]
    new, before = tmp_path / "new", read_files(here)
    outcome = run_forked(program, *(flag.format(here=here, new=new) for flag in flags))
    assert outcome.status == 2, outcome.stderr[-3000:]
    *warnings, error = outcome.stderr.splitlines()
    assert warnings == (["bad image 'train/dog/b.png': empty"] if case == "folder with a bad image" else [])
    assert error.startswith(f"{program}: error: ")
    for message in messages:
        assert any(alternative in error for alternative in message.split("|")), error
    assert not new.exists()
    changed = {name for name, _ in read_files(here).items() ^ before.items()}
    # Whether checkpoints are damaged shows when training starts, which is after its flags are written.
    assert case == "damaged training checkpoint" or not changed
    assert changed <= {f"damaged_run/{runs.CONFIG_NAME}", f"damaged_run/{runs.INPUT_NAME}"}


def test_one_bad_command_as_a_user_runs_it(run_program, tmp_path):
    """In a new process, not a forked one: the same line and status."""
    result = run_program(TRAIN, f"--workdir={tmp_path / 'run'}", "--dataset=digitz")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "train/main.py: error: dataset 'digitz' is not in TFDS; "
        "known: digits, cifar10, folder:PATH, and every TFDS name"
    ]
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("first\n  second"), FileNotFoundError("gone"), PermissionError("no")])
def test_errors_become_one_line(error, capfd):
    with pytest.raises(SystemExit) as exit_, cli.bad_input_exits():
        raise error
    assert exit_.value.code == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert printed.endswith(f"error: {' '.join(str(error).split())}\n")


@pytest.mark.parametrize(
    "error, status",
    [
        (OSError(28, "No space left on device"), 1),
        (FloatingPointError("No finite loss left on device"), 3),
        (tf.errors.ResourceExhaustedError(None, None, "{{node x}} /events; No space left on device\n\tmore"), 1),
    ],
)
def test_failed_work_gives_one_line_and_another_status(error, status, capfd):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli._run(main, [])
    assert exit_.value.code == status
    assert re.fullmatch(r"\S+: error: [^\n{}]* left on device\n", capfd.readouterr().err)


def test_damaged_files_of_a_dataset_are_bad_input(capfd):
    def main(_):
        raise tf.errors.DataLossError(
            None, None, "Graph execution error:\n\ncorrupted at 7\n\t [[{{node Next}}]]\nmore"
        )

    with pytest.raises(SystemExit) as exit_:
        cli._run(main, [])
    assert exit_.value.code == 2
    assert "is damaged (corrupted at 7); remove the dataset's folder" in capfd.readouterr().err


def test_interrupted_by_the_user(capfd):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        cli._run(main, [])
    assert exit_.value.code == 130
    assert capfd.readouterr().err.endswith("error: interrupted; files written earlier are intact\n")


def test_faults_of_the_program_are_not_bad_input():
    with pytest.raises(KeyError), cli.bad_input_exits():
        raise KeyError
    with pytest.raises(KeyError):
        cli._run(lambda _: {}[0], [])


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    storage.write_json(path, {"top1_percent": 1})
    with pytest.raises(TypeError):
        storage.write_json(path, {"top1_percent": object()})
    assert json.loads(path.read_text()) == {"top1_percent": 1}
    with pytest.raises(RuntimeError), storage.atomic_write(tmp_path / "model.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["report.json"]
    storage.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


def assert_equal_weights(actual, expected):
    for actual_weight, expected_weight in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(actual_weight, expected_weight)


def test_weights_are_copied_between_equal_networks_only(tmp_path):
    source, target = (build_repvgg("digits", (8, 8, 1), 10, norm=norm) for norm in ("bn", "oabn"))
    runs.copy_weights(source, target)
    assert_equal_weights(target.get_weights(), source.get_weights())
    for other in (
        build_repvgg("digits", (8, 8, 1), 11),
        build_repvgg("digits", (8, 8, 1), 10, identity="none"),
        build_repvgg("digits", (8, 8, 1), 10, block="qarepvgg"),
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]),
    ):
        before = target.get_weights()
        with pytest.raises(ValueError, match="the checkpoint is of another network"):
            runs.copy_weights(other, target)
        assert_equal_weights(target.get_weights(), before)


def test_a_run_goes_on_with_the_same_flags_only(tmp_path):
    """A flag that the program did not have when the run began must have its default value."""

    def read_settings(*arguments, younger=False):
        values = absl_flags.FlagValues()
        define = {"flag_values": values, "module_name": "program"}
        absl_flags.DEFINE_integer("epochs", 10, "", **define)
        absl_flags.DEFINE_boolean("validation", True, "", **define)
        absl_flags.DEFINE_string("init_from", None, "", **define)
        if younger:
            absl_flags.DEFINE_float("ema", 0.0, "", **define)
        values(["program", *arguments])
        return cli.read_settings("program", flag_values=values)

    run = runs.Run(tmp_path)
    run.check_settings(read_settings("--epochs=4"))  # it holds no run yet
    run.start(read_settings("--epochs=3"), {"dataset": "digits"})
    assert (tmp_path / runs.CONFIG_NAME).read_text() == "--epochs=3\n--validation\n"
    run.check_settings(read_settings("--epochs=3"))
    run.check_settings(read_settings("--epochs=3", "--ema=0", younger=True))
    for arguments in (
        ["--epochs=4"],
        ["--epochs=3", "--novalidation"],
        ["--epochs=3", "--ema=0.9"],
        ["--epochs=3", "--init_from=x"],
    ):
        changed = arguments[-1].lstrip("-").removeprefix("no").partition("=")[0]
        with pytest.raises(ValueError, match=f"other values of {changed}; use another workdir"):
            run.check_settings(read_settings(*arguments, younger=True))
    run.check_settings(read_settings("--epochs=3", "--novalidation"), may_differ=["validation"])
    with pytest.raises(ValueError, match="other values of epochs; use another workdir"):
        run.check_settings(read_settings("--epochs=4", "--novalidation"), may_differ=["validation"])
