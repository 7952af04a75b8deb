"""The documents and configs/ against the code and the results: flags, files, links, tables, and examples that run."""

import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

import tf_repvgg
from tf_repvgg import runs
from tf_repvgg.models import VARIANTS
from tf_repvgg.quantization.ptq import METHODS, parse_method
from tf_repvgg.tflite.targets import TARGETS
from tf_repvgg.training.cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "results/README.md", "experiments/README.md")
    for path in ROOT.glob(pattern)
)
PAGES_WITH_EXAMPLES = [
    document for document in DOCUMENTS if "```python" in (ROOT / document).read_text(encoding="utf-8")
]
CONFIGS = sorted((ROOT / "configs").glob("*.flags"))
CHECKPOINTS = sorted((ROOT / "results" / "checkpoints").iterdir())
FOLDERS = "configs|experiments|benchmarks|results|tests|train|export|docs|tf_repvgg"
# Flags of other programs: absl, TensorBoard, LiteRT's benchmark_model, pip, pytest.
FOREIGN_FLAGS = {"flagfile", "help", "logdir", "graph", "num_threads", "array", "nodes"}
# Old paths, and placeholders for names that the reader chooses.
PATHS_THAT_DO_NOT_EXIST = re.compile(r"NAME")

_PARSING = """
import runpy, sys
runpy.run_path("train/main.py", run_name="train_main")
from absl import flags
for path in sys.argv[1:]:
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train/main.py", f"--flagfile={path}", "--workdir=x"])
    print(flags.FLAGS.dataset)
"""


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def find_tables(text):
    """All tables of a page, each a list of lines; how far its columns are padded does not matter."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[re.sub(r" +|-+", lambda run: run[0][0], line) for line in block.splitlines()] for block in blocks]


def find_examples(document):
    return re.findall(r"^```python\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)


def find_anchors(path):
    """The anchors of a Markdown file's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@functools.cache
def load_hooks():
    return load_module(ROOT / "docs" / "hooks.py")


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def find_flags():
    sources = [
        path for folder in ("train", "export", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    return {
        name
        for path in (*sources, *(ROOT / "tf_repvgg").glob("*.py"), ROOT / "tests" / "conftest.py")
        for name in re.findall(r'(?:DEFINE_\w+|addoption)\(\s*"(?:--)?(\w+)"', path.read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_are_named_exist(document):
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z_0-9]*)(?![A-Za-z_0-9-])", read(document)))
    assert {name for name in named if not {name, name.removeprefix("no")} & (find_flags() | FOREIGN_FLAGS)} == set()


def test_documents_name_many_flags_and_files():
    """Or else the patterns of the tests around have stopped matching."""
    text = "".join(map(read, DOCUMENTS))
    assert len(set(re.findall(r"--([a-z][a-z_0-9]*)", text))) > 60
    assert len(set(re.findall(rf"(?:{FOLDERS})/[\w*/]+\.\w+", text))) > 40


# CHANGELOG.md names files that have moved, by their old paths.
@pytest.mark.parametrize("document", sorted({*DOCUMENTS} - {"CHANGELOG.md"}))
def test_files_that_are_named_exist(document):
    files = set(re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w*/]+\.\w+", read(document)))
    folders = set(re.findall(rf"(?<![\w/.:])(?:{FOLDERS})/[\w/]*(?=`)", read(document)))
    named = {path for path in files | folders if not PATHS_THAT_DO_NOT_EXIST.search(path)}
    assert {path for path in named if not list(ROOT.glob(path.rstrip("/")))} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_library_exist(document):
    for name in set(re.findall(r"`(tf_repvgg(?:\.\w+)+)`", read(document))):
        value = tf_repvgg
        for part in name.split(".")[1:]:
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_resolve(document):
    prose = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose):
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in find_anchors(path), target


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 120


def test_tables_in_the_readme_are_those_of_the_results():
    """The table of headline results as it is; any other table whose columns are those of one in results/ is there."""
    tables = find_tables(read("README.md"))
    (headline,) = find_tables(read("results/headline.md"))
    assert headline in tables
    measured = [table for page in (ROOT / "results").glob("*.md") for table in find_tables(page.read_text("utf-8"))]
    headers = {header for header, *_ in measured}
    for table in tables:
        assert table[0] not in headers or table in measured


def test_table_of_the_demo_in_the_readme_is_that_of_the_recorded_run():
    models = json.loads(read("results/demo.json"))["models"]
    text = read("README.md")
    for name, record in models.items():
        (row,) = re.findall(rf"^    {name}  +(\d+\.\d  .*)$", text, re.MULTILINE)
        top1 = {
            (file["weight_bits"], file["granularity"]): f"{file['top1_percent']:.1f}"
            for file in record["export"]["files"]
        }
        cells = [f"{top1[bits, 'per_tensor']} / {top1[bits, 'per_channel']}" for bits in (8, 7, 6, 5, 4, 3)]
        assert re.split("  +", row) == [f"{record['export']['float_fused_top1_percent']:.1f}", *cells]
        largest = max(layer["outlier_ratio"] for layer in record["export"]["outliers"])
        assert re.search(rf"^      {name} +{largest:.1f}$", text, re.MULTILINE)


@pytest.mark.parametrize("document", sorted({*PAGES_WITH_EXAMPLES} - {"README.md"}))
def test_examples_of_the_documents_run(run_forked, tmp_path, document):
    (tmp_path / "example.py").write_text("\n".join(find_examples(document)), encoding="utf-8")
    outcome = run_forked(tmp_path / "example.py")
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert outcome.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that building leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tf_repvgg", folder / "source" / "tf_repvgg", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_package(wheel):
    """By way of the source distribution, from which `python -m build` builds the wheel."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tf_repvgg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("tf_repvgg/")} == expected
    assert "tf_repvgg/report/page.html" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_example_of_the_readme_runs_from_the_wheel_without_the_clone(wheel, tmp_path):
    """The pinned packages are those of this environment; the package itself comes from the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (example,) = find_examples("README.md")
    (tmp_path / "example.py").write_text(f"{example}\nprint(tf_repvgg.__file__)\n", encoding="utf-8")
    outcome = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert Path(outcome.stdout.splitlines()[-1]).is_relative_to(tmp_path)
    accuracies = [float(percent) for percent in re.findall(r": ([\d.]+) %$", outcome.stdout, re.MULTILINE)]
    assert len(accuracies) == 3 and min(accuracies) > 80  # far above chance, which is 10 %


@pytest.mark.parametrize("program", load_hooks().PROGRAMS)
def test_command_line_reference_has_every_flag(program):
    page = load_hooks().on_page_markdown(read("docs/commands.md"))
    section = page.split(f"## {program}\n")[1].split("\n## ")[0]
    expected = {flag["name"] for flag in load_hooks().read_flags()[program]}
    assert len(expected) > 9
    assert {name.removeprefix("[no]") for name in re.findall(r"^\| `--(\S+)`", section, re.MULTILINE)} == expected


def test_flags_of_the_reference_are_those_of_help(run_forked):
    """`--help` prints all flags of the program itself; docs/list_flags.py finds them in another way."""
    outcome = run_forked("export/benchmark.py", "--help")
    printed = set(re.findall(r"^  --(?:\[no\])?(\w+):", outcome.stdout, re.MULTILINE))
    assert printed == {flag["name"] for flag in load_hooks().read_flags()["export/benchmark.py"]}


def test_methods_and_variants_are_generated_and_targets_complete():
    ptq = load_hooks().on_page_markdown(read("docs/ptq.md"))
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.summary} |" in ptq
    (choice,) = [table for table in find_tables(read("docs/ptq.md")) if table[0] == "| situation | method |"]
    for name in re.findall(r"`([\w+]+)`", "".join(choice)):
        parse_method(name)  # raises for an unknown one
    training = load_hooks().on_page_markdown(read("docs/training.md"))
    assert all(f"| `{name}` |" in training for name in VARIANTS)
    targets = set(re.findall(r"^\| `(\w+)`(?: to `(\w+)`)? \|", read("docs/exporting.md"), re.MULTILINE))
    assert {name for pair in targets for name in pair if name} <= TARGETS.keys()
    assert TARGETS.keys() <= {name for pair in targets for name in pair} | {
        name for name in TARGETS if name.startswith("ethos_u")
    }


@pytest.mark.parametrize("figure", ["architecture", "data_flow"])
def test_drawings_are_those_of_their_programs(figure, monkeypatch):
    """That of the architecture is drawn from the imports of the source: redraw it after a change."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    expected = load_module(ROOT / "docs" / "figures" / f"{figure}.py").render()
    assert read(f"docs/images/{figure}.svg") == expected, f"run: python docs/figures/{figure}.py"


def test_every_picture_of_the_documentation_has_a_program():
    programs = {path.stem for path in (ROOT / "docs" / "figures").glob("*.py")}
    assert {path.stem for path in (ROOT / "docs" / "images").iterdir()} == programs - {"style"}


def test_numbers_about_several_machines_are_those_of_the_results():
    page = "\n".join(line for table in find_tables(read("docs/distributed.md")) for line in table)
    for rows in json.loads(read("results/distributed.json"))["cases"].values():
        for layout, row in rows.items():
            cells = f"{row['images_per_second_p50']:.1f} | {row['speed_over_one_core_p50']:.2f}"
            assert f"| {layout} | {cells} |" in page
    for stage, row in json.loads(read("results/input.json"))["stages"].items():
        assert f"| {stage} | {row['images_per_second_p50']:g} | {row['cores_per_training_core_p50']:g} |" in page


def run_script(number, folder, python, **variables):
    """Runs a shell script of BUILD.md with a program in place of Python; returns the lines that it prints."""
    scripts = re.findall(r"^(    #!/bin/sh\n(?:    .*\n)+)", read("BUILD.md"), re.MULTILINE)
    (folder / "script.sh").write_text(textwrap.dedent(scripts[number]))
    for name, text in {"python": python, "scontrol": "printf 'host1\\nhost2\\n'"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    command = ["sh", "script.sh"]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_a_queue_runs_each_line_of_flags(tmp_path, run_forked):
    """Slurm's arrays and indexed jobs of Kubernetes; the flags of BUILD.md's example are understood."""
    cells = re.findall(r"^    (--workdir=.*)$", read("BUILD.md"), re.MULTILINE)
    (tmp_path / "cells.txt").write_text("\n".join(cells) + "\n")
    for number, name in enumerate(("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID")):
        program, *arguments = run_script(1, tmp_path, 'printf "%s\\n" "$@"', **{name: str(number)})
        assert (program, arguments) == ("export/main.py", cells[number].split())
        outcome = run_forked(program, *arguments)
        assert outcome.status == 2 and "does not exist" in outcome.stderr, outcome.stderr


def test_slurm_gives_each_worker_its_cluster(tmp_path):
    variables = {"SLURM_JOB_NODELIST": "host[1-2]", "SLURM_PROCID": "1"}
    (text,) = run_script(0, tmp_path, 'echo "$TF_CONFIG"', **variables)
    assert Cluster.read(text) == Cluster(("host1:2222", "host2:2222"), 1)


def test_citation_names_version_and_papers():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == tf_repvgg.__version__
    cited = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    sources = {method.source for method in METHODS.values() if method.source}
    assert {f"arXiv:{source}" for source in sources | {"2402.07200", "2101.03697", "2212.01593"}} <= cited
    assert citation["preferred-citation"]["title"] in " ".join(read("README.md").split())
    assert f"## [{tf_repvgg.__version__}]" in read("CHANGELOG.md")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_open_with_what_they_are_and_their_command(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \w.*\w", first) and second.startswith("#")
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(path.name in line or "experiments/" in line for line in comments)


def test_configs_are_understood(run_forked, tmp_path):
    (tmp_path / "parsing.py").write_text(_PARSING)
    paths = (path.relative_to(ROOT) for path in CONFIGS)
    outcome = run_forked(tmp_path / "parsing.py", *paths, import_from="train")
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert len(outcome.stdout.splitlines()) == len(CONFIGS) > 10


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
def test_committed_runs_have_the_flags_of_their_configs(run_forked, tmp_path, path):
    """Experiments start from them by their configs; flags are compared before data are looked for."""
    flags = (f"--flagfile=configs/{path.name}.flags", f"--workdir={path}", f"--data_dir={tmp_path}")
    outcome = run_forked("train/main.py", *flags, "--evaluate_only")
    assert outcome.status != 0 and str(tmp_path) in outcome.stderr
    assert "other values" not in outcome.stderr


def test_committed_models_load():
    """Files name weights by classes and attributes of layers, which must therefore keep their names."""
    for path in CHECKPOINTS:
        model = runs.load_model(path)
        with zipfile.ZipFile(path / runs.MODEL_NAME) as archive:
            file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
        (stem,) = (group for name, group in file["layers"].items() if name.endswith("rep_vgg_block"))
        np.testing.assert_array_equal(model.get_layer("stem").conv3x3.kernel, stem["conv3x3/vars/0"])
