"""The examples in docstrings: every public class and function has one, and it runs as it stands."""

import contextlib
import doctest
import functools
import importlib
import inspect
import io
import pkgutil

import pytest
from absl import flags

import tf_repvgg
from tf_repvgg import native_output

# What programs outside rely on, whatever else moves: see also `__all__` of the packages.
PUBLIC_NAMES = (
    "checkpoints.load_keras",
    "checkpoints.load_torch",
    "checkpoints.save_torch",
    "fusion.fuse",
    "layers.OutlierAwareBatchNormalization",
    "layers.OutlierAwareBatchNormalization.effective_gamma",
    "layers.QARepVGGBlock",
    "layers.QARepVGGBlock.equivalent_kernel_and_bias",
    "layers.RepVGGBlock",
    "layers.RepVGGBlock.equivalent_kernel_and_bias",
    "models.VARIANTS",
    "models.build_repvgg",
    "outliers.report",
    "quantization.cluster_quantize",
    "quantization.learned_step_quantize",
    "quantization.ptq.dequantized",
    "quantization.ptq.quantize",
    "quantization.quantize_activations",
    "quantization.strip_cluster_quantize",
    "quantization.strip_learned_step",
    "report.write",
    "tflite.convert",
    "tflite.operators",
    "tflite.predict",
)

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def import_modules():
    """Every module of tf_repvgg, by name."""
    names = [module.name for module in pkgutil.walk_packages(tf_repvgg.__path__, "tf_repvgg.")]
    return {name: importlib.import_module(name) for name in ("tf_repvgg", *names)}


def look_up(name):
    """The value of tf_repvgg.NAME, after nothing but `import tf_repvgg`; None if there is none."""
    return functools.reduce(lambda value, attribute: getattr(value, attribute, None), name.split("."), tf_repvgg)


MODULES = import_modules()
EXPORTED = {
    f"{name}.{symbol}": getattr(module, symbol, None)
    for name, module in MODULES.items()
    for symbol in getattr(module, "__all__", ())
}
SYMBOLS = EXPORTED | {f"tf_repvgg.{name}": look_up(name) for name in PUBLIC_NAMES}
FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = [test for module in MODULES.values() for test in FINDER.find(module) if test.examples]


def is_code(symbol):
    return inspect.isclass(symbol) or inspect.isroutine(symbol)


def names_that_need_an_example():
    """A name for each class and function of this package, not for methods; packages export some under several names."""
    names = {}
    for name, symbol in SYMBOLS.items():
        if is_code(symbol) and symbol.__module__.startswith("tf_repvgg") and "." not in symbol.__qualname__:
            names.setdefault(symbol, name)
    return list(names.values())


@pytest.mark.parametrize("name", names_that_need_an_example())
def test_public_symbol_has_an_example(name):
    # Not inspect.getdoc, which takes the docstring of a base class for a class without one.
    docstring = SYMBOLS[name].__dict__["__doc__"] if inspect.isclass(SYMBOLS[name]) else SYMBOLS[name].__doc__
    assert docstring and ">>> " in docstring


def test_public_symbols_exist():
    """Each is a module, class, function or constant."""
    assert len(EXPORTED) > 50
    for name, symbol in SYMBOLS.items():
        assert inspect.ismodule(symbol) or is_code(symbol) or isinstance(symbol, dict | tuple | str), name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example, tmp_path, monkeypatch):
    """In a namespace and a folder without anything in them, as in a reader's new session."""
    monkeypatch.chdir(tmp_path)
    defined = set(flags.FLAGS)
    example.globs = {"__name__": "__main__"}
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    with native_output.hide(), contextlib.redirect_stderr(io.StringIO()):
        results = runner.run(example, out=report.write)
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)
    assert results.failed == 0, report.getvalue()
    assert results.attempted
