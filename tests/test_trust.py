"""Damaged and hostile files, values of flags, and signals: one clear line, nothing lost, nothing waited for."""

import concurrent.futures
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import tf_keras as keras
from absl import flags

from tf_repvgg import cli, regular_files, runs, storage
from tf_repvgg.tflite import isolated
from tf_repvgg.training import checkpoints, logs


@pytest.fixture(autouse=True)
def _work_in_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SPECIAL_FILES = {
    "a link": lambda path: os.symlink("../precious", path),
    "another name of a file": lambda path: os.link("precious", path),
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a loop": lambda path: os.symlink(os.path.basename(path), path),
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_special_files_are_neither_written_through_nor_waited_for(kind, tmp_path):
    (tmp_path / "precious").write_text("4242\n")  # as a lock holds it
    os.mkdir("run")
    for name in (".lock", "metrics.jsonl", ".model.tflite.partial"):
        SPECIAL_FILES[kind](f"run/{name}")
    with pytest.raises(OSError, match=r"run/\.lock'") as error:
        storage.claim_folder("run")
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"metrics\.jsonl'"):
        storage.append_line("run/metrics.jsonl", "{}")
    if kind not in ("a link", "another name of a file"):
        with pytest.raises(OSError, match=r"metrics\.jsonl'"):
            regular_files.read_bytes("run/metrics.jsonl")
    storage.write_bytes("run/model.tflite", b"TFL3")
    assert regular_files.read_bytes("run/model.tflite") == b"TFL3"
    assert (tmp_path / "precious").read_text() == "4242\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "metrics.jsonl", "model.tflite"}


def test_folders_of_a_run_are_no_links(tmp_path):
    for name in ("checkpoints", "tensorboard"):
        run = runs.Run(tmp_path / f"with_{name}")
        run.path.mkdir()
        (tmp_path / name).mkdir()
        (run.path / name).symlink_to(tmp_path / name)
        with pytest.raises(OSError, match=rf"{name}' is a link, and nothing is written through links; remove it"):
            run.claim()


def test_files_have_a_bounded_size(tmp_path):
    (tmp_path / "large").write_bytes(b"12345")
    assert regular_files.read_bytes("large", largest=5) == b"12345"
    with pytest.raises(OSError, match="'large' has 5 bytes; at most 4 are read"):
        regular_files.read_bytes("large", largest=4)
    with pytest.raises(OSError, match="'/proc/self/maps' has more than the 4 bytes that are read"):
        regular_files.read_bytes("/proc/self/maps", largest=4)


BAD_INPUTS = {
    "{": "is damaged: it is not JSON",
    "[" * 100_000: "is damaged: it is not JSON",
    "\udcff": "is damaged: it is not JSON in UTF-8",
    "[]": r"its content is \[\], but `object` is expected",
    "{}": "dataset is missing",
    '{"dataset": 3}': "dataset is 3, but `str` is expected",
    '{"dataset": "d", "size": [8]}': r"size is \[8\], but `array` of length 2 is expected",
    '{"dataset": "d", "size": [8, 0]}': r"size\[1\] is 0, but `int` >= 1 is expected",
    '{"dataset": "d", "size": [8, 9e99]}': r"size\[1\] is 9e\+99, but `int` is expected",
    '{"dataset": "d", "mean": NaN}': "mean is nan, but `float` >= -1000000.0 is expected",
    '{"dataset": "d", "std": [1, 0]}': r"std\[1\] is 0, but `float` >= 1e-06 is expected",
    '{"dataset": "d", "labels": ["a", null]}': r"labels\[1\] is None, but `str` is expected",
    '{"dataset": "d", "validation_held_out": "no"}': "validation_held_out is 'no', but `bool` is expected",
}


@pytest.mark.parametrize("content", BAD_INPUTS, ids=lambda content: content[:45])
def test_a_damaged_description_is_named_with_its_key(content, tmp_path):
    (tmp_path / "input.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^input\.json:? {BAD_INPUTS[content]}"):
        runs.read_input(".")


def test_damaged_logs_are_refused_before_training(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"epoch": 1, "seconds": 2.0, "loss": float("nan")})
    for line in (
        "null",
        '{"epoch": 2}',
        '{"epoch": -1, "seconds": 2}',
        '{"epoch": 2, "seconds": "2"}',
        '{"epoch": 2, ',
    ):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            logs.MetricsLog(path, epochs_done=2)
    logs.MetricsLog(path, epochs_done=1)  # drops a line that a killed process has written in part
    assert path.read_text() == f"{good}\n"


def test_a_changed_result_is_computed_again(tmp_path):
    work, inputs = storage.FinishedWork(tmp_path / "kept", is_sealed=True), {"bits": 4, "range": (0, 1)}
    work.keep("int4", inputs, {"top1": 91.25}, b"TFL3")
    assert work.find("int4", inputs)["top1"] == 91.25
    record, content = tmp_path / "kept" / "int4.json", tmp_path / "kept" / "int4.bin"
    for path in (record, content):
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            kept = work.find("int4", inputs)
            assert kept is None, kept
        path.write_bytes(whole[:-3])
        assert work.find("int4", inputs) is None
        path.unlink()
        assert work.find("int4", inputs) is None
        path.mkdir()
        assert work.find("int4", inputs) is None
        work.keep("int4", inputs, {"top1": 91.25}, b"TFL3")
        assert work.read_content("int4") == b"TFL3"


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd")
    callback = checkpoints.Checkpoints(tmp_path / "whole", model)
    callback.set_model(model)
    callback.on_epoch_end(0)
    (tmp_path / "whole" / "ckpt-x").mkdir()  # of no checkpoint's name
    folder = tmp_path / "whole" / "ckpt-0"
    assert checkpoints.list_checkpoints(tmp_path / "whole") == [folder]
    position = json.loads((folder / "position.json").read_text())
    unsealed = {"step": 0, "seconds": 0.0, "metrics": []}
    damages = {
        "state.data-00000-of-00001": [(folder / "state.data-00000-of-00001").read_bytes()[:-9]],
        "state.index": [b"", b"\0" * 200],
        "position.json": [
            json.dumps(content).encode()
            for content in (
                None,
                position | {"epoch": 2},
                unsealed | {"epoch": -1},
                unsealed | {"epoch": "x"},
                unsealed | {"epoch": 10**30},
            )
        ],
    }
    for name, contents in damages.items():
        whole = (folder / name).read_bytes()
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"ckpt-0' is damaged or of another network \(.*\); delete it"):
                checkpoints.Checkpoints(tmp_path / "whole", model)
        (folder / name).write_bytes(whole)
    assert checkpoints.Checkpoints(tmp_path / "whole", model).first_epoch == 1
    folder.rename(folder.with_name("ckpt-7"))
    with pytest.raises(ValueError, match="it is of step 0"):
        checkpoints.Checkpoints(tmp_path / "whole", model)


def test_a_run_that_was_killed_before_it_removed_old_checkpoints_removes_them(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1, input_shape=[1])])
    model.compile("sgd")
    saved = checkpoints.Checkpoints(tmp_path, model)
    saved.set_model(model)
    model.optimizer.iterations.assign(5)
    saved.on_epoch_end(0)
    for step in (1, 2, 3):
        (tmp_path / f"ckpt-{step}").mkdir()
    checkpoints.Checkpoints(tmp_path, model)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["ckpt-5", "ckpt-3"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rate=nan", "--rate is nan; give a finite number"),
        ("--rate=-inf", "--rate is -inf; give a finite number"),
        ("--rate=1e39", "--rate is 1e.39; give a number up to 1e.30"),
        ("--size=9223372036854775808", "--size is 9223372036854775808; give a number up to 2147483647"),
        ("--path=", "--path is empty; give a value, or leave the flag out"),
    ],
)
def test_values_of_flags_are_finite_and_not_empty(argument, message):
    values = flags.FlagValues()
    flags.DEFINE_float("rate", float("inf"), "", flag_values=values)
    flags.DEFINE_integer("size", 2**40, "", flag_values=values)
    flags.DEFINE_integer("seed", 0, "", upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_string("path", "", "", flag_values=values)
    values(["program", "--seed=4294967295"])
    cli.check_values(values)  # defaults are the program's own
    values(["program", argument])
    with pytest.raises(ValueError, match=message):
        cli.check_values(values)


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    order = []

    def hold(number):
        with storage.wait_for_lock(tmp_path / "new" / ".lock"):
            order.append(number)
            time.sleep(0.05)
            order.append(number)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(hold, range(2)))
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])


SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job ignore it
sys.path.insert(0, {root!r})
import types
package = types.ModuleType("tf_repvgg")  # without TensorFlow, which takes seconds to import
package.__path__ = [{root!r} + "/tf_repvgg"]
sys.modules["tf_repvgg"] = package
from tf_repvgg import interruption

class Careless:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})

def work():
    with interruption.raise_signals():
        with interruption.allow_deferral():
            if {place!r} == "step":
                interruption.defer_signals()
                os.kill(os.getpid(), signal.{number})
                print("checkpoint", interruption.is_requested())
                interruption.raise_received()
            if {place!r} == "native code":
                try:
                    os.kill(os.getpid(), signal.{number})
                except BaseException:
                    raise ValueError("invalid matrix") from None
            Careless()

interruption.end_at_signals()
if {place!r} == "import":
    os.kill(os.getpid(), signal.{number})
try:
    work()
except (KeyboardInterrupt, interruption.Terminated) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", ["import", "step", "destructor", "native code"])
def test_signals_end_a_program_in_one_line(number, place, request):
    code = SIGNALLED.format(root=str(request.config.rootpath), number=number, place=place)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if place in ("step", "native code"):  # the program's own handling follows
        name = "KeyboardInterrupt" if number == "SIGINT" else "Terminated"
        checkpoint = "checkpoint True\n" if place == "step" else ""
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{checkpoint}{name}\n", "")
    else:
        assert result.returncode == 128 + getattr(signal, number)
        assert result.stderr.splitlines()[1:] == []
        assert result.stderr.endswith("ed; files written earlier are intact\n")


def test_a_file_may_use_no_more_memory_than_its_process(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**30, resource.RLIM_INFINITY))
    assert isolated.memory_limit() == 2**30
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert isolated.memory_limit() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
