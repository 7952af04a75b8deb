"""Importing tf_repvgg before TensorFlow, after it, and when Keras 3 is already active."""

import concurrent.futures
import os

import pytest

CHECK = "import tf_keras; assert tf.keras.layers.Layer is tf_keras.layers.Layer; print('Keras 2')"
PROGRAMS = {
    "before": f"import tf_repvgg, tensorflow as tf; {CHECK}",
    "after": f"import tensorflow as tf, tf_repvgg; {CHECK}",
    "after Keras 3": "import tensorflow as tf; tf.keras.layers.Dense; import tf_repvgg",
}


@pytest.fixture(scope="module")
def results(run_program):
    """The result of each program, each in a new process whose environment does not choose a Keras version."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda code: run_program("-c", code, env=environment), PROGRAMS.values())
        return dict(zip(PROGRAMS, results, strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_order_does_not_matter(results, order):
    assert results[order].returncode == 0, results[order].stderr[-2000:]
    assert results[order].stdout == "Keras 2\n"


def test_active_keras_3_is_an_error_that_says_what_to_do(results):
    result = results["after Keras 3"]
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: tf_repvgg needs Keras 2, but tf.keras is already Keras 3")
    assert "Import tf_repvgg before anything that touches tf.keras" in message
    assert "TF_USE_LEGACY_KERAS=1" in message


def test_import_is_quiet(results):
    """The package prints nothing on stderr. TensorFlow prints its own messages if it is imported first."""
    assert results["before"].stderr == ""
