"""tf_repvgg beside TensorFlow, in either order, and where Keras 3 is already active."""

import ast
import concurrent.futures
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM_FOLDERS = {"train", "export", "experiments", "benchmarks"}

CHECK = "import tf_keras; assert tf.keras.layers.Layer is tf_keras.layers.Layer; print('Keras 2')"
PROGRAMS = {
    "before": f"import tf_repvgg, tensorflow as tf; {CHECK}",
    "after": f"import tensorflow as tf, tf_repvgg; {CHECK}",
    "after Keras 3": "import tensorflow as tf; tf.keras.layers.Dense; import tf_repvgg",
}


@pytest.fixture(scope="module")
def results(run_program):
    """Each program in a process of its own that knows nothing of this one's choice of Keras."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda code: run_program("-c", code, env=environment), PROGRAMS.values())
        return dict(zip(PROGRAMS, found, strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_order_does_not_matter(results, order):
    assert results[order].returncode == 0, results[order].stderr[-2000:]
    assert results[order].stdout == "Keras 2\n"


def test_active_keras_3_is_an_error_that_says_what_to_do(results):
    result = results["after Keras 3"]
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: tf_repvgg needs Keras 2, but tf.keras is already Keras 3")
    assert "Import tf_repvgg before anything that touches tf.keras" in last
    assert "TF_USE_LEGACY_KERAS=1" in last


def test_import_is_quiet(results):
    """Nothing on stderr from the package itself; TensorFlow imported first may speak for itself."""
    assert results["before"].stderr == ""


def test_library_does_not_import_the_command_lines():
    programs = {path.stem for folder in PROGRAM_FOLDERS for path in (ROOT / folder).glob("*")} | PROGRAM_FOLDERS
    assert {"main", "fine_tuning", "harness", "train"} <= programs
    for path in (ROOT / "tf_repvgg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & programs, path
