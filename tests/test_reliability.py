"""Faults at every write of the storage layer, and the attacks of experiments/reliability.py in short."""

import json
import signal

import numpy as np
import pytest
from helpers.forked_programs import Outcome

from tf_repvgg import runs, storage
from tf_repvgg.models import build_repvgg

SETTINGS = {"epochs": runs.Setting("--epochs=3", is_default=False)}


def test_work_completes_after_a_fault_at_any_write(run_program, tmp_path):
    outcome = run_program("tests/helpers/write_points.py", tmp_path)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert int(outcome.stdout) > 30


@pytest.fixture(scope="module")
def materials(experiments, digits_file, tmp_path_factory):
    """Files for all readers, and a folder for mutated ones."""
    from harness.reliability.readers import Readers, make_materials

    folder = tmp_path_factory.mktemp("materials")
    run = runs.Run(folder / "source")
    run.start(SETTINGS, {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 64.0})
    run.save_model(build_repvgg("digits", (8, 8, 1), 10))
    storage.append_line(run.metrics_path, '{"epoch": 1, "seconds": 2.0, "loss": 0.5}')
    run.write_result({"split": "test", "images": 360, "top1_percent": 50.0})
    (folder / "int8.tflite").write_bytes(digits_file)
    make_materials(folder / "materials", run.path, folder / "int8.tflite")
    Readers().check(folder / "materials")
    return folder


def test_mutated_files_are_read_or_refused_in_one_line(experiments, materials):
    from harness.reliability import read_batch, verdicts

    read_batch.run_batch(materials / "materials", materials / "sandbox", materials / "verdicts", 0, range(40))
    records = [json.loads(line) for line in (materials / "verdicts").read_text(encoding="utf-8").splitlines()]
    ended = [record for record in records if "outcome" in record]
    assert len(ended) == 40
    assert {record["outcome"] for record in ended} == {verdicts.REFUSED, verdicts.ACCEPTED}, ended


def test_mutations_come_from_their_seed(experiments):
    from harness.reliability.mutators import choose_mutator, draw_flag_value

    contents = {
        "input.json": b'{"dataset": "digits", "size": [8, 8]}',
        "metrics.jsonl": b'{"epoch": 1}\n{"epoch": 2}\n',
        "config.flags": b"--epochs=3\n--flip\n",
        "state": bytes(range(256)),
    }
    for name, content in contents.items():
        mutated = [choose_mutator(name)(content, np.random.default_rng(seed)) for seed in range(30)]
        assert mutated == [choose_mutator(name)(content, np.random.default_rng(seed)) for seed in range(30)]
        assert len(set(mutated)) > 15
    drawn = {draw_flag_value(["true", "false"], False, np.random.default_rng(seed)) for seed in range(50)}
    assert {"true", "false"} < drawn


@pytest.mark.parametrize(
    ("status", "stderr", "outcome"),
    [
        (2, "train/main.py: error: --epochs is 0\n", "refused in one line"),
        (2, "epoch 1/1:  20%|██  | 1/5\rtrain/main.py: error: --epochs is 0\n", "refused in one line"),
        (130, "\x1b[A\x1b[Atrain: error: interrupted\n", "other status"),
        (2, "w4.tflite: taken from the run that was interrupted\nexport/main.py: error: one\n", "refused in one line"),
        (2, "Generating...: 50%|██ | 1/2\n\x1b[A\n\x1b[A\x1b[Atrain/main.py: error: one\n", "refused in one line"),
        (2, "train/main.py: error: one\nand another line\n", "other status"),
        (1, "train/main.py: error: [Errno 21] Is a directory\n", "other status"),
        (0, "", "accepted"),
        (1, "Traceback (most recent call last):\nValueError: --epochs\n", "traceback"),
        (-signal.SIGALRM, "", "hang"),
        (-signal.SIGSEGV, "", "death by signal"),
    ],
)
def test_verdicts(experiments, status, stderr, outcome):
    from harness.reliability.verdicts import FAULTS, judge, summarize

    verdict = judge("flags", Outcome(status, "", stderr, 1.0), "--epochs=0")
    assert verdict.outcome == outcome
    row = summarize([verdict])["flags"]
    assert row["tried"] == row[outcome] == 1
    assert len(row["faults"]) == (outcome in FAULTS)


def test_fingerprints_notice_weights_and_not_times(experiments, materials, tmp_path):
    from harness.reliability.fingerprints import describe_difference, take_fingerprint

    for name, seconds in (("first", 2.0), ("second", 3.0)):
        run = runs.Run(tmp_path / name)
        model = runs.load_model(materials / "source")
        run.start(SETTINGS, {"dataset": "digits"})
        run.save_model(model)
        storage.append_line(run.metrics_path, f'{{"epoch": 1, "seconds": {seconds}}}')
        run.write_result({"images": 360})
    first = take_fingerprint(tmp_path / "first")
    assert describe_difference(take_fingerprint(tmp_path / "second"), first) == ""
    weight = model.weights[3]
    weight.assign(np.nextafter(weight.numpy(), np.inf))
    run.save_model(model)
    run.write_result({"images": 361})
    assert describe_difference(take_fingerprint(tmp_path / "second"), first) == "model.keras, result.json"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_programs_in_one_line(experiments, run_forked, tmp_path, number):
    from harness.reliability.verdicts import REFUSED, judge

    command = ("train/main.py", "--flagfile=configs/digits_oabn.flags", f"--workdir={tmp_path}/run")
    kill = {"folder": str(tmp_path), "event": 3, "seconds": 0.05, "number": int(number)}
    verdict = judge("signal", run_forked(*command, kill=kill), "", [128 + number])
    assert verdict.outcome == REFUSED, verdict
