"""Processes for LiteRT and TFLite Micro that inherit nothing from the program that starts them."""

import collections
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg

from tf_repvgg import tflite
from tf_repvgg.tflite import clean_process
from tf_repvgg.tflite.clean_process import ProcessEnded, RemoteError, RemoteObject
from tf_repvgg.tflite.isolated import Isolated

# A program as a user might write it, without `if __name__ == "__main__"`. Garbage of TensorFlow's converter and of
# LiteRT, with threads of its own, is still there when other processes start; a forked process that collects it crashes.
PROGRAM = """
import gc, os
import numpy as np
import tf_keras as keras
from tf_repvgg import tflite
from tf_repvgg.quantization import ptq
from tf_repvgg.tflite import targets
from tf_repvgg.tflite.isolated import Isolated
gc.disable()
os.register_at_fork(after_in_child=gc.collect)
images = np.random.default_rng(0).uniform(-1, 1, [64, 8, 8, 3]).astype("float32")
model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Conv2D(8, 3, activation="relu"),
                          keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5)])
model.compile("sgd", "mse")
model.fit(images, np.zeros([64, 5]), verbose=0)
file = tflite.convert(ptq.quantize(model, "codebook", 3, calibration=images))
other_file = tflite.convert(model, images)
expected = tflite.predict(file, images)
with Isolated("a.tflite", file) as isolated, Isolated("b.tflite", other_file) as other:
    assert min(isolated.times(3) + other.times(3)) > 0
    np.testing.assert_array_equal(isolated.predict(images), expected)
micro = targets.TARGETS["tflm_lut"](file)
np.testing.assert_array_equal(micro.predict(images), micro.predict_int8(images))
np.testing.assert_allclose(micro.predict(images), expected, atol=0.05)
print("done")
"""


def test_after_training_and_predicting_in_the_same_process(run_program, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run_program(tmp_path / "program.py")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-3000:]


@pytest.fixture(scope="module")
def file():
    return tflite.convert(small_repvgg(), random_images(8))


def test_results_and_errors():
    with RemoteObject(collections.Counter, "abca") as counter:
        assert counter.call("most_common", 1) == [("a", 2)]
        counter.call("update", "bb")  # the object stays
        assert counter.call("most_common", 1) == [("b", 3)]
        with pytest.raises(RemoteError, match="has no attribute"):
            counter.call("nothing")
        assert counter.call("total") == 6
    with RemoteObject(int, "seven") as number, pytest.raises(ValueError, match="invalid literal for int"):
        number.call("bit_length")


def test_a_process_that_takes_too_long_or_ends():
    with RemoteObject(threading.Event) as event:
        with pytest.raises(TimeoutError):
            event.call("wait", 100, seconds=0.2)
        os.kill(event.process_id, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ProcessEnded, match="SIGKILL"):
                event.call("is_set")


def test_many_at_a_time():
    with RemoteObject(threading.Event) as first, RemoteObject(threading.Event) as second:
        first.start_call("wait", 0.01)
        second.start_call("set")
        second.wait()
        assert second.call("is_set") and first.wait() is False
        assert first.process_id != second.process_id


def test_a_process_holds_no_tensorflow_and_a_limit_of_memory(file):
    keras.backend.clear_session()
    with Isolated("a.tflite", file) as isolated:
        isolated.times(1)
        libraries = Path(f"/proc/{isolated.process_id}/maps").read_text()
        assert "/ai_edge_litert/" in libraries and "/tensorflow/" not in libraries
        assert resource.prlimit(isolated.process_id, resource.RLIMIT_AS) == (2**34, 2**34)
        assert 0 < isolated.peak_memory_mib() < 200


def test_starting_takes_no_import_of_tensorflow(file):
    started = time.monotonic()
    with Isolated("a.tflite", file) as isolated:
        isolated.times(1)
    assert time.monotonic() - started < 5  # with a new server, on a busy machine; TensorFlow alone takes longer


KILLED_PROGRAM = """
import json, os, signal, threading, time
from tf_repvgg.tflite import clean_process
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts programs in the background without it
event = clean_process.RemoteObject(threading.Event)
event.start_call("wait", 1000)
idle = clean_process.RemoteObject(threading.Event)
print(json.dumps([event.process_id, idle.process_id, clean_process._find_server()._process.pid]), flush=True)
time.sleep(1000)
"""


def is_running(process_id):
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return False
    return not re.search(r"State:\s+[ZX]", status)


@pytest.mark.parametrize("kill, number", [(os.kill, signal.SIGKILL), (os.killpg, signal.SIGINT)])
def test_no_process_outlives_its_program(kill, number):
    """Killed without warning, and interrupted as by Control-C in a terminal, which reaches all processes."""
    command = [sys.executable, "-c", KILLED_PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **pipes) as program:
        process_ids = json.loads(program.stdout.readline())
        assert all(is_running(process_id) for process_id in process_ids)
        kill(program.pid, number)
    deadline = time.monotonic() + 20
    while any(is_running(process_id) for process_id in process_ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


FORKING_PROGRAM = """
import os, threading
from tf_repvgg.tflite import clean_process
def check():
    with clean_process.RemoteObject(threading.Event) as event:
        assert event.call("is_set") is False
    return clean_process._find_server()._process.pid
server = check()
if (child := os.fork()) == 0:
    assert check() != server
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert check() == server
"""


def test_a_forked_program_has_a_server_of_its_own(run_program):
    result = run_program("-c", FORKING_PROGRAM)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_server_that_has_been_killed_is_started_again():
    process = clean_process._find_server()._process
    process.kill()
    process.wait()
    with RemoteObject(collections.Counter, "aa") as counter:
        assert counter.call("total") == 2
