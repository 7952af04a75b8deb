"""Shared fixtures: one prepared data directory, one trained digits model, and programs run as a user runs them."""

# ruff: noqa: E402  (the environment must be set before TensorFlow and TFDS read it)

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Digits are written once per session, away from the user's own TFDS folder; subprocesses inherit the place.
_TFDS_FOLDER = tempfile.TemporaryDirectory(prefix="tf_repvgg_tfds_")
os.environ["TFDS_DATA_DIR"] = _TFDS_FOLDER.name

import numpy as np
import pytest
import tf_keras as keras
from hypothesis import HealthCheck, settings

from tf_repvgg import fusion, tflite
from tf_repvgg.data import ClassificationData
from tf_repvgg.models import build_repvgg
from tf_repvgg.training import optimization

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run: a failure in CI is one that anyone can see again.
settings.register_profile(
    "stable",
    derandomize=True,
    deadline=None,
    max_examples=15,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("stable")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="How often tests/test_surviving.py kills.")
    parser.addoption("--full_width", action="store_true", help="tests/test_models.py fuses variants as published.")


def pytest_collection_modifyitems(items):
    """Files that run whole programs come first: they take longest, and what begins last decides when all has ended."""
    running = {item.path for item in items if {"run_program", "run_forked"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in running)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same seed and leaves the dtype policy as it was."""
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")
    keras.backend.clear_session()


@pytest.fixture(scope="session")
def run_program():
    """run_program("train/main.py", "--epochs=1", ...) -> CompletedProcess with text output, run in the repository."""

    def run(*command, timeout=400, **kwargs):
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs
        )

    return run


@pytest.fixture(scope="session")
def run_forked(tmp_path_factory):
    """run_forked("train/main.py", "--epochs=1", ...) -> status, stdout, stderr; TensorFlow is imported only once.

    kill={"folder": path, "event": number, "seconds": delay} ends it early: see helpers/preloaded.py.
    """
    folder = tmp_path_factory.mktemp("forked")
    numbers = itertools.count()
    command = [sys.executable, "tests/helpers/preloaded.py"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(*command, **case):
            output = folder / str(next(numbers))
            case |= {"command": [str(word) for word in command], "output": str(output)}
            print(json.dumps(case), file=server.stdin, flush=True)
            return SimpleNamespace(
                status=int(server.stdout.readline()),
                stdout=output.with_suffix(".out").read_text(),
                stderr=output.with_suffix(".err").read_text(),
            )

        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def digits():
    return ClassificationData("digits", hold_out=False, crop_padding=1)


@pytest.fixture(scope="session")
def digits_test_split(digits):
    """(normalised images, labels) of the whole test split."""
    batches = [(images.numpy(), labels.numpy()) for images, labels in digits.evaluation("test", 500)]
    return tuple(np.concatenate(part) for part in zip(*batches, strict=True))


@pytest.fixture(scope="session")
def trained_digits(digits):
    """A RepVGG with OABN after a few epochs on digits, in training form."""
    keras.utils.set_random_seed(0)
    epochs, batch_size = 6, 64
    model = build_repvgg("digits", digits.image_shape, digits.num_classes, norm="oabn", oabn_k=0.1)
    steps = digits.steps_per_epoch(batch_size)
    trainer = keras.Model(model.inputs, model.outputs)
    optimizer = optimization.make_optimizer(0.1, steps * epochs, steps, weight_decay=5e-3)
    trainer.compile(optimizer, optimization.CrossEntropy(digits.num_classes))
    trainer.fit(digits.training(batch_size, range(epochs)), steps_per_epoch=steps, epochs=epochs, verbose=0)
    return model


@pytest.fixture(scope="session")
def fused_digits(trained_digits):
    return fusion.fuse(trained_digits)


@pytest.fixture(scope="session")
def digits_file(fused_digits, digits):
    """The trained digits model as an int8 file, per channel."""
    return tflite.convert(fused_digits, digits.calibration(256), metadata={"dataset": "digits", "mean": 128.0})
