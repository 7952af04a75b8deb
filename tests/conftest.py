"""Fixtures for all tests: a prepared data set, a model trained on it, and programs run as a user runs them."""

# ruff: noqa: E402  (TensorFlow and TFDS read the environment when they are imported)

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The digits data set is prepared once per session, outside the user's own TFDS folder; subprocesses inherit the path.
_TFDS_FOLDER = tempfile.TemporaryDirectory(prefix="tf_repvgg_tfds_")
os.environ["TFDS_DATA_DIR"] = _TFDS_FOLDER.name

import numpy as np
import pytest
import tf_keras as keras
from helpers.forked_programs import ForkedPrograms
from hypothesis import HealthCheck, settings

from tf_repvgg import fusion, tflite
from tf_repvgg.data import ClassificationData
from tf_repvgg.models import build_repvgg
from tf_repvgg.training import optimization

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run, so that anyone can reproduce a failure in CI.
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
    parser.addoption("--kills", type=int, default=8, help="Number of kills in tests/test_surviving.py.")
    parser.addoption("--full_width", action="store_true", help="Networks of full width too, which takes minutes.")


def pytest_collection_modifyitems(items):
    """Puts files that run programs first: they take longest, and a long file at the end would keep one worker busy."""
    slow_files = {item.path for item in items if {"run_program", "run_forked"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_collection_finish(session):
    """Spares garbage collections the modules that are imported by now: they took a thirteenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _isolate_keras():
    """Starts every test from the same seed, and resets the state of Keras after it."""
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_global_policy("float32")
    keras.backend.clear_session()


@pytest.fixture(scope="session")
def run_program():
    """run_program("train/main.py", "--epochs=1", ...) -> CompletedProcess with text output; runs in the repository."""

    def run(*command, timeout=400, **kwargs):
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs
        )

    return run


@pytest.fixture(scope="session")
def forked_programs(tmp_path_factory):
    """Programs in processes that need not import TensorFlow again: see helpers/forked_programs.py."""
    with ForkedPrograms(tmp_path_factory.mktemp("forked")) as programs:
        yield programs


@pytest.fixture(scope="session")
def run_forked(forked_programs):
    """run_forked("train/main.py", "--epochs=1", ...) -> Outcome; imports TensorFlow only once.

    With import_from="train", a script somewhere else imports modules as the programs in that folder do. With
    kill={"folder": path, "event": number, "seconds": delay}, the program is killed: see helpers/preloaded.py.
    """
    return forked_programs.run


@pytest.fixture(scope="module")
def experiments():
    """Makes the modules in experiments/ importable, as the programs there import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        yield


@pytest.fixture(scope="session")
def digits():
    return ClassificationData("digits", hold_out=False, crop_padding=1)


@pytest.fixture(scope="session")
def digits_test_split(digits):
    """(normalized images, labels) of the whole test split, as two arrays."""
    batches = [(images.numpy(), labels.numpy()) for images, labels in digits.evaluation("test", 500)]
    return tuple(np.concatenate(part) for part in zip(*batches, strict=True))


@pytest.fixture(scope="session")
def trained_digits(digits):
    """A RepVGG with OABN, trained on digits for a few epochs, in training form."""
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
