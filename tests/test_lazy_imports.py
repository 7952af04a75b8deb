"""`import tf_repvgg` offers every part of the package, and imports what is slow or optional only when it is used."""

import importlib
import json

import pytest

PARTS = ("data", "fusion", "layers", "models", "outliers", "quantization", "report", "tflite")

# {what a new process does, in this order: packages that it must not have imported until then}
CASES = {
    "import tf_repvgg": {"matplotlib", "sklearn", "tensorflow_datasets", "tensorflow_model_optimization"},
    "dir(tf_repvgg)": {"tensorflow_datasets", "tensorflow_model_optimization"},
    "tf_repvgg.models": {"tensorflow_datasets", "tensorflow_model_optimization"},
    "import tf_repvgg.data; dir(tf_repvgg.data)": {"sklearn", "tensorflow_datasets"},
    "import tf_repvgg.data.image_folder, tf_repvgg.data.rand_augment": {"tensorflow_datasets"},
    "import tf_repvgg.report": {"matplotlib", "jinja2", "tensorflow_datasets"},
    "from tf_repvgg.data import Digits; Digits": {"sklearn"},
}


@pytest.fixture(scope="module")
def imported_modules(run_program):
    """{case: modules that have been imported after it}."""
    list_modules = "exec(case, globals()) or list(sys.modules)"
    program = f"import json, sys; print(json.dumps([{list_modules} for case in {list(CASES)}]))"
    result = run_program("-c", program)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(zip(CASES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_slow_packages_are_imported_where_they_are_used(imported_modules, case):
    assert CASES[case] & set(imported_modules[case]) == set()


def test_every_part_is_an_attribute(run_program):
    """In a new process, after nothing but `import tf_repvgg`."""
    program = f"""
import types
import tf_repvgg
assert set({PARTS}) <= set(tf_repvgg.__all__) <= set(dir(tf_repvgg))
assert all(isinstance(getattr(tf_repvgg, name), types.ModuleType) for name in {PARTS})
assert tf_repvgg.models.build_repvgg("a0", (32, 32, 3), 10).output_shape == (None, 10)
assert {{"Digits", "ClassificationData"}} <= set(dir(tf_repvgg.data))
assert tf_repvgg.data.Digits.name == "digits"
print(tf_repvgg.__version__)
"""
    result = run_program("-c", program)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count(".") == 2


@pytest.mark.parametrize("module", ["tf_repvgg", "tf_repvgg.data"])
def test_unknown_attributes_are_refused(module):
    package = importlib.import_module(module)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
