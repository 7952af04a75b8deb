"""results/README.md and the other pages: what their programs write from the committed JSON files."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def results(experiments):
    from harness.results.sources import load_results

    return load_results(RESULTS)


def read(name):
    return (RESULTS / name).read_text(encoding="utf-8").rstrip()


def test_the_committed_page_is_what_the_program_writes(results):
    from harness.results import headline, page

    assert page.render(results, RESULTS) == read("README.md")
    assert headline.render(results) == read("headline.md")


def test_the_committed_pages_are_what_the_experiments_write(results):
    """Without low_bit.md, which test_low_bit.py renders from the fine-tunings."""
    from harness.any_model import page as any_model
    from harness.fit import page as fit
    from harness.oabn_limit import clip_page, codebook_page
    from harness.pages import int8_collapse, min_max, recipes, targets
    from harness.ptq import page as ptq
    from harness.reliability import page as reliability

    pages = {
        "any_model": any_model,
        "clip_limit": clip_page,
        "codebook_limit": codebook_page,
        "fit": fit,
        "int8_collapse": int8_collapse,
        "min_max": min_max,
        "ptq": ptq,
        "recipes": recipes,
        "reliability": reliability,
        "targets": targets,
    }
    for name, page in pages.items():
        assert page.render(results[name]) == read(f"{name}.md"), name


def test_a_sentence_that_no_longer_holds_is_refused(results):
    from harness.results import page

    changed = copy.deepcopy(results)
    for file in changed["min_max"]["OABN"]["export"]["files"]:
        file["top1_percent"] = 10.0
    with pytest.raises(page.OutdatedSentence, match=r"page\.md\.jinja"):
        page.render(changed, RESULTS)


def test_links_and_pictures_of_the_page_exist():
    text = read("README.md")
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^##+ (.+)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (RESULTS / target).exists(), target


def test_the_headline_figure(results, tmp_path):
    """Drawn from small models; 1800 pixels wide."""
    import matplotlib.pyplot as plt
    from harness.results import headline_figure

    from tf_repvgg.models import build_repvgg

    models = {title: build_repvgg("cifar-s", (32, 32, 3), 10, norm=title.lower()) for title in ("BN", "OABN")}
    exports = {title: model["export"] for title, model in results["min_max"].items()}
    headline_figure.draw(models, exports, tmp_path / "headline.png")
    assert plt.imread(tmp_path / "headline.png").shape[1] == plt.imread(RESULTS / "headline.png").shape[1] == 1800
    assert not plt.get_fignums()


def test_kept_trainings_of_codebook_limit_are_found(experiments, results, monkeypatch):
    """A run of the experiment with all trainings kept trains nothing, and chooses as the committed file does."""
    from harness import commands
    from harness.oabn_limit import codebook_trainings
    from harness.oabn_limit.candidates import LIMITS

    monkeypatch.setattr(commands, "train", None)
    record = results["codebook_limit"]
    schedule = {name: record[name] for name in ("epochs", "early_epochs")}
    kept = codebook_trainings.Trainings(RESULTS / "codebook_limit", "runs/clip_limit", schedule, None)
    trainings = [kept.measure(k, 0) for k in LIMITS]
    finalists = codebook_trainings.pick_finalists(trainings)
    trainings += [kept.measure(k, seed) for seed in codebook_trainings.FINAL_SEEDS for k in finalists]
    assert codebook_trainings.choose(trainings) == record["chosen"]
    for training, committed in zip(trainings, record["trainings"], strict=True):
        assert committed.items() <= training.items()
    assert {training["machine"]["cpu"] for training in trainings} == {record["machine"]["cpu"]}


def test_codebook_limit_keeps_each_training(experiments, monkeypatch, tmp_path):
    from harness import commands
    from harness.oabn_limit.codebook_trainings import Trainings

    trained = []

    def train(config, workdir, **flags):
        trained.append((config, workdir, flags))
        return {"top1_percent": float(len(trained))}

    monkeypatch.setattr(commands, "train", train)
    trainings = Trainings(tmp_path, "runs", {"epochs": 1, "early_epochs": 0}, None)
    first = trainings.measure("0.1", 2)
    assert (first["float"], first["8"], first["4"]) == (1, 2, 3)
    assert trainings.measure("0.1", 2) == first and len(trained) == 3
    _, base, _ = trained[0]
    assert {flags["init_from"] for _, _, flags in trained[1:]} == {base}
    assert json.loads((tmp_path / "0.1_seed2.json").read_text()) == first
    assert Trainings(tmp_path, "runs", {"epochs": 2, "early_epochs": 0}, None).measure("0.1", 2)["float"] == 4


def test_committed_runs_are_copied_only_unchanged(experiments, monkeypatch, tmp_path):
    from harness import commands

    committed = tmp_path / "committed" / "config"
    committed.mkdir(parents=True)
    (committed / "result.json").write_text('{"top1_percent": 1.0}')
    started = []

    def run(script, *arguments, workdir, **flags):
        started.append((script, sorted(path.name for path in Path(workdir).glob("*")), flags))
        Path(workdir).mkdir(exist_ok=True)
        (Path(workdir) / "result.json").write_text('{"top1_percent": 2.0}')

    monkeypatch.setattr(commands, "CHECKPOINTS", tmp_path / "committed")
    monkeypatch.setattr(commands, "_run", run)
    unchanged, changed = tmp_path / "unchanged", tmp_path / "changed"
    assert commands.train("config", unchanged, data_dir="x") == {"top1_percent": 2.0}
    commands.train("config", changed, data_dir="x", seed=1)
    commands.train("config", unchanged, data_dir="x", seed=1)
    assert [files for _, files, _ in started] == [["result.json"], [], ["result.json"]]


def test_exports_are_taken_for_the_same_model_and_flags_only(experiments, monkeypatch, tmp_path):
    from harness import commands

    started = []

    def run(script, *, workdir, **flags):
        started.append(flags)
        content = {"flags": {"weight_bits": flags["weight_bits"]}, "model_sha256": "a", "files": [{"layers": []}]}
        (tmp_path / "export").mkdir(exist_ok=True)
        (tmp_path / "export" / "export.json").write_text(json.dumps(content))

    monkeypatch.setattr(commands, "_run", run)
    monkeypatch.setattr(commands.runs, "model_sha256", lambda _: "a")
    for bits in ("8", "8", "4"):
        assert commands.export(tmp_path, weight_bits=bits, data_dir="x")["flags"]["weight_bits"] == bits
    assert [flags["weight_bits"] for flags in started] == ["8", "4"]
    monkeypatch.setattr(commands.runs, "model_sha256", lambda _: "b")
    commands.export(tmp_path, weight_bits="4", data_dir="x")
    assert len(started) == 3


def test_pages_are_wrapped_without_touching_tables(experiments):
    from harness.tables import wrap_page

    text = "word " * 60
    page = f"# {text}\n\n| {text} |\n\n    {text}\n\n{text}\n\n- {text}\n- {text}"
    title, table, code, paragraph, items = wrap_page(page).split("\n\n")
    assert all("\n" not in block for block in (title, table, code))
    assert np.max([len(line) for line in (paragraph + "\n" + items).splitlines()]) <= 120
    assert [line[:2] for line in items.splitlines()] == ["- ", "  ", "  ", "- ", "  ", "  "]
