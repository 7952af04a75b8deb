"""README.md, BUILD.md and configs/ against what there is: flags, files, and tables of results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "BUILD.md")
CONFIGS = sorted((ROOT / "configs").glob("*.flags"))
CHECKPOINTS = sorted((ROOT / "results" / "checkpoints").iterdir())
# Of programs that are not ours: absl, TensorBoard, LiteRT's benchmark_model.
OTHERS = {"flagfile", "help", "logdir", "graph", "num_threads"}

_PARSING = """
import runpy, sys
sys.path.insert(0, "train")
runpy.run_path("train/main.py", run_name="train_main")
from absl import flags
for path in sys.argv[1:]:
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train/main.py", f"--flagfile={path}", "--workdir=x"])
    print(flags.FLAGS.dataset)
"""


def tables(text):
    """All tables of a page, each a list of lines; how far its columns are padded does not matter."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[re.sub(r" +|-+", lambda run: run[0][0], line) for line in block.splitlines()] for block in blocks]


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    sources = [
        path for folder in ("train", "export", "experiments", "benchmarks") for path in (ROOT / folder).glob("*.py")
    ]
    defined = {
        name
        for path in (*sources, ROOT / "tests" / "conftest.py")
        for name in re.findall(r'(?:DEFINE_\w+|addoption)\(\s*"(?:--)?(\w+)"', path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"--([a-z][a-z_0-9]*)", text))
    assert len(named) > 10
    assert {name for name in named if not {name, name.removeprefix("no")} & (defined | OTHERS)} == set()
    paths = set(
        re.findall(r"(?<![\w/])(?:configs|experiments|benchmarks|results|tests|train|export)/[\w*/]+\.\w+", text)
    )
    assert len(paths) > 3
    assert {path for path in paths if not list(ROOT.glob(path))} == set()


def test_tables_in_the_readme_are_those_of_the_results():
    """A table in README with the columns of one in results/ is one in results/."""
    measured = [table for page in (ROOT / "results").glob("*.md") for table in tables(page.read_text(encoding="utf-8"))]
    headers = {header for header, *_ in measured}
    shown = [table for table in tables((ROOT / "README.md").read_text(encoding="utf-8")) if table[0] in headers]
    assert len(shown) >= 2
    for table in shown:
        assert table in measured


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_open_with_what_they_are_and_their_command(path):
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \w.*\w", first) and second.startswith("#")
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(path.name in line or "experiments/" in line for line in comments)


def test_configs_are_understood(run_forked, tmp_path):
    (tmp_path / "parsing.py").write_text(_PARSING)
    outcome = run_forked(tmp_path / "parsing.py", *(path.relative_to(ROOT) for path in CONFIGS))
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert len(outcome.stdout.splitlines()) == len(CONFIGS) > 10


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
def test_committed_runs_have_the_flags_of_their_configs(run_forked, tmp_path, path):
    """Experiments start from them by their configs; flags are compared before data are looked for."""
    flags = (f"--flagfile=configs/{path.name}.flags", f"--workdir={path}", f"--data_dir={tmp_path}")
    outcome = run_forked("train/main.py", *flags, "--evaluate_only")
    assert outcome.status != 0 and str(tmp_path) in outcome.stderr
    assert "other values" not in outcome.stderr
