"""The rules of the house: which module may import which, how things are named, and what is annotated.

Each rule is a function from a parsed file to its violations, which `test_each_rule_can_fail` tries on a bad example.
"""

import ast
import graphlib
import json
import re
from pathlib import Path

import pytest
import tf_keras as keras

ROOT = Path(__file__).resolve().parents[1]
PROGRAM_FOLDERS = ("train", "export", "experiments", "benchmarks")
ALL_FOLDERS = ("tf_repvgg", *PROGRAM_FOLDERS, "tests")

# The rooms of tf_repvgg/, each a module or a package, from the ground floor up. A room imports from itself and from the
# floors below it, so from no other room on its own floor. The room "quantization" is the package without its wings.
FLOORS = (
    ("regular_files",),
    ("json_records",),
    ("run_records",),
    (
        "autograph",
        "by_name",
        "converter_errors",
        "graph",
        "interruption",
        "memory",
        "native_output",
        "provenance",
        "storage",
        "version",
    ),
    ("converter", "data", "layers", "temporary_files"),
    ("fusion", "models", "outliers"),
    ("checkpoints",),
    ("quantization", "runs"),
    ("quantization.ptq", "quantization.qat"),
    ("tflite",),
    ("quantization.fitting",),
    ("training",),
    ("report",),
    ("cli", "image_flags"),
)

# Packages that take long to import or are optional: whoever needs one imports it where it is used.
EXPENSIVE = ("ai_edge_litert", "matplotlib", "sklearn", "tensorflow_datasets", "tensorflow_model_optimization", "torch")

LONGEST_FILE = 400

# Pronouns, and nouns that say nothing about what they name. A direction may be called left, beside top or right.
EMPTY_NAMES = re.compile("asked|each|facts|found|its|left|mine|of_.*|one|ours|theirs|those|wanted|what|words")

IRREGULAR_PARTICIPLES = {
    "built",
    "drawn",
    "found",
    "given",
    "kept",
    "known",
    "left",
    "made",
    "sent",
    "taken",
    "written",
}
VERBS_IN_ED = {"embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "succeed"}
ALLOWED_PARTICIPLES = {"dequantized", "learned_step_quantize"}  # public names, which programs of users call


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def library_modules():
    """{name within tf_repvgg: path}; the package itself is ""."""
    modules = {}
    for path in python_files("tf_repvgg"):
        parts = path.relative_to(ROOT / "tf_repvgg").with_suffix("").parts
        modules[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return modules


def find_violations(rule, *folders):
    """The violations of a rule in all files of some folders, as file:line: message."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for path in python_files(*folders)
        for line, message in rule(parse(path))
    ]


def assert_none(lines):
    assert not lines, "\n" + "\n".join(lines)


def walk_without_type_checking(tree):
    """All nodes but those under `if TYPE_CHECKING:`, which is False when the program runs."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"):
            yield node
            yield from walk_without_type_checking(node)


def find_imports(tree):
    """(line, dotted name of a module, or of a name in it) for every import, in functions too."""
    for node in walk_without_type_checking(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where an arrow leads"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def find_library_imports(tree, modules):
    """(line, name within tf_repvgg) for every import of one of the library's modules."""
    for line, name in find_imports(tree):
        package, _, module = name.partition(".")
        if package == "tf_repvgg":
            yield line, module if module in modules else module.rpartition(".")[0]


def room_of(module):
    rooms = [room for floor in FLOORS for room in floor if f"{module}.".startswith(f"{room}.")]
    assert rooms, f"tf_repvgg.{module} is in no room of FLOORS: give it a floor"
    return max(rooms, key=len)


def floor_of(room):
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def find_upward_imports(module, tree, modules):
    room = room_of(module)
    for line, imported in find_library_imports(tree, modules):
        imported_room = room_of(imported) if imported else "tf_repvgg"
        if not imported or (imported_room != room and floor_of(imported_room) >= floor_of(room)):
            yield line, f"{room} imports {imported_room}, which is not on a floor below"


def test_imports_go_one_way():
    modules = library_modules()
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {message}"
        for module, path in modules.items()
        if module  # the package itself is the roof
        for line, message in find_upward_imports(module, parse(path), modules)
    ]
    assert_none(upward)


def test_no_modules_import_each_other_in_a_circle():
    modules = library_modules()
    imports = {name: find_library_imports(parse(path), modules) for name, path in modules.items()}
    graphlib.TopologicalSorter({name: {module for _, module in lines} for name, lines in imports.items()}).prepare()


def find_imports_of_programs(tree, programs):
    for line, name in find_imports(tree):
        if name.partition(".")[0] in programs:
            yield line, f"imports the program {name}"


def test_no_module_imports_a_program():
    """A program is a file that runs as __main__; what programs share is in modules beside them."""
    files = python_files(*PROGRAM_FOLDERS)
    programs = {path.stem for path in files if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}
    assert {"main", "benchmark", "demo", "train_step"} <= programs
    assert_none(find_violations(lambda tree: find_imports_of_programs(tree, programs), "tf_repvgg", *PROGRAM_FOLDERS))


def test_the_library_imports_nothing_that_belongs_to_programs():
    beside_programs = {path.stem for folder in PROGRAM_FOLDERS for path in (ROOT / folder).glob("*")}
    names = beside_programs | set(PROGRAM_FOLDERS)
    assert {"main", "harness", "train"} <= names
    assert_none(find_violations(lambda tree: find_imports_of_programs(tree, names), "tf_repvgg"))


def keras_internals():
    """Names with an underscore that Keras gives to models, layers, tensors and the nodes between them."""
    inputs = keras.Input((2,))
    layer = keras.layers.Dense(2)
    model = keras.Model(inputs, layer(inputs))
    names = {name for thing in (model, layer, inputs, inputs.node) for name in dir(thing)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def find_keras_internals(tree, internals):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in internals:
            # A subclass may use what it inherits.
            is_inherited = getattr(node.value, "id", None) == "self" or isinstance(node.value, ast.Call)
            if not is_inherited:
                yield node.lineno, f"Keras internal {node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in internals:
            yield node.lineno, f"Keras internal {node.value!r}"


def test_keras_internals_are_used_in_graph_only():
    internals = keras_internals()
    assert {"_nodes_by_depth", "_tensor_usage_count", "_nested_inputs", "_flatten_layers"} <= internals
    lines = find_violations(lambda tree: find_keras_internals(tree, internals), *ALL_FOLDERS)
    elsewhere = [line for line in lines if not line.startswith(("tf_repvgg/graph.py", "tests/test_house.py"))]
    assert len(elsewhere) < len(lines)
    assert_none(elsewhere)


def find_missing_annotations(tree):
    """Of public functions, and of public methods of public classes, where __init__ may leave out its return."""

    def is_public(node):
        return not node.name.startswith("_") or node.name in ("__init__", "__call__")

    def check(function, name, arguments):
        named = [*arguments, *function.args.kwonlyargs, function.args.vararg, function.args.kwarg]
        missing = [argument.arg for argument in named if argument and argument.annotation is None]
        if function.returns is None and function.name != "__init__":
            missing.append("return")
        if missing:
            yield function.lineno, f"{name} does not annotate {', '.join(missing)}"

    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_public(node):
            yield from check(node, node.name, node.args.posonlyargs + node.args.args)
        elif isinstance(node, ast.ClassDef) and is_public(node):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and is_public(method):
                    arguments = method.args.posonlyargs + method.args.args
                    is_static = "staticmethod" in map(ast.unparse, method.decorator_list)
                    yield from check(method, f"{node.name}.{method.name}", arguments if is_static else arguments[1:])


def test_public_functions_are_annotated():
    assert_none(find_violations(find_missing_annotations, "tf_repvgg"))


def find_definitions(tree):
    """(line, name) of every variable, argument, attribute and function that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname)


def find_empty_names(tree):
    for statement in tree.body:
        names = list(find_definitions(statement))
        is_about_directions = bool({"right", "top"} & {name for _, name in names})
        for line, name in names:
            if EMPTY_NAMES.fullmatch(name.strip("_")) and not (name == "left" and is_about_directions):
                yield line, f"{name} says nothing about what it names"


def test_names_say_what_they_name():
    assert_none(find_violations(find_empty_names, *ALL_FOLDERS))


def find_participles(tree):
    """Functions whose name begins with a participle. Properties and fixtures are values, so theirs may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in ALLOWED_PARTICIPLES:
            first = node.name.strip("_").partition("_")[0]
            is_participle = first in IRREGULAR_PARTICIPLES or (first.endswith("ed") and first not in VERBS_IN_ED)
            decorators = {word for decorator in node.decorator_list for word in re.split(r"\W", ast.unparse(decorator))}
            if is_participle and not decorators & {"property", "cached_property", "fixture", "setter"}:
                yield node.lineno, f"{node.name} is no verb"


def test_functions_are_verbs():
    assert_none(find_violations(find_participles, *ALL_FOLDERS))


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*ALL_FOLDERS)}
    assert_none([f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > LONGEST_FILE])


def test_files_are_named_after_what_is_in_them():
    paths = [path.relative_to(ROOT) for path in python_files(*ALL_FOLDERS)]
    assert_none([str(path) for path in paths if path.stem in ("common", "misc", "util", "utils")])


BAD_EXAMPLES = {
    "an arrow up": (
        lambda tree: find_upward_imports("layers.batch_norm", tree, {"layers", "fusion"}),
        "from tf_repvgg import fusion",
    ),
    "an arrow up in a function": (
        lambda tree: find_upward_imports("quantization.uniform", tree, {"tflite"}),
        "def write():\n    from tf_repvgg.tflite import convert",
    ),
    "an arrow to the other wing": (
        lambda tree: find_upward_imports("quantization.ptq.network", tree, {"quantization.qat.lsq"}),
        "import tf_repvgg.quantization.qat.lsq",
    ),
    "an arrow to the roof": (
        lambda tree: find_upward_imports("cli", tree, {""}),
        "from tf_repvgg import __version__",
    ),
    "a program": (lambda tree: find_imports_of_programs(tree, {"main"}), "from main import load"),
    "an attribute of Keras": (lambda tree: find_keras_internals(tree, {"_nodes"}), "print(model._nodes)"),
    "an attribute of Keras by name": (lambda tree: find_keras_internals(tree, {"_nodes"}), "getattr(model, '_nodes')"),
    "an argument": (find_missing_annotations, "def fuse(model) -> Model: ..."),
    "a return": (find_missing_annotations, "def fuse(model: Model): ..."),
    "keywords": (find_missing_annotations, "class Layer:\n    def __init__(self, **kwargs): ..."),
    "a static method": (find_missing_annotations, "class Limit:\n    @staticmethod\n    def parse(k) -> int: ..."),
    "a variable": (find_empty_names, "its = 1"),
    "a loop variable": (find_empty_names, "[words for words in lines]"),
    "an argument without meaning": (find_empty_names, "def fuse(one): ..."),
    "what is left": (find_empty_names, "left = 1"),
    "a participle": (find_participles, "def copied(layer): ..."),
    "an irregular participle": (find_participles, "class File:\n    def _written_whole(self): ..."),
}
GOOD_EXAMPLES = """
import tensorflow
from typing import TYPE_CHECKING
from tf_repvgg.layers.clip_limit import ClipLimit
if TYPE_CHECKING:
    from tf_repvgg import fusion
class Layer:
    def __init__(self, filters: int, **kwargs: object):
        self._nodes = filters
    @property
    def merged_kernel(self) -> int: ...
    @staticmethod
    def seed(value: int) -> None: ...
def _load(path): ...
def crop(image: int) -> int:
    top, left = 1, 2
    return top + left
"""


@pytest.mark.parametrize("example", BAD_EXAMPLES)
def test_each_rule_can_fail(example):
    rule, source = BAD_EXAMPLES[example]
    assert len(list(rule(ast.parse(source)))) == 1


@pytest.mark.parametrize("example", BAD_EXAMPLES)
def test_no_rule_forbids_good_code(example):
    rule, _ = BAD_EXAMPLES[example]
    assert list(rule(ast.parse(GOOD_EXAMPLES))) == []


START_UP = f"""
import json, runpy, sys
import tf_repvgg
modules = [set(sys.modules)]
sys.argv = ["train/main.py", "--help"]
sys.path.insert(0, "train")
try:
    runpy.run_path("train/main.py", run_name="__main__")
except SystemExit:
    modules.append(set(sys.modules))
print(json.dumps([sorted(names & set({EXPENSIVE!r})) for names in modules]))
"""


def test_starting_up_imports_no_expensive_package(run_program):
    """`import tf_repvgg`, and `python train/main.py --help`."""
    result = run_program("-c", START_UP)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "--workdir" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1]) == [[], []]
