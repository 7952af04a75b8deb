"""The experiment on few clusters: intervals, kept fine-tunings, choices, rows, page and figure."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tf_repvgg import runs, storage

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "results" / "checkpoints"


@pytest.fixture(scope="module")
def low_bit(experiments):
    """The parts of the experiment, importable as its program imports them."""
    import low_bit as program
    from harness import commands
    from harness.low_bit import figure, fine_tunings, learning_rates, methods, models, page, paired_statistics, rows

    return SimpleNamespace(
        program=program,
        commands=commands,
        figure=figure,
        fine_tunings=fine_tunings,
        learning_rates=learning_rates,
        methods=methods,
        models=models,
        page=page,
        paired_statistics=paired_statistics,
        rows=rows,
    )


def make_result(low_bit, *is_right):
    return low_bit.fine_tunings.Result(np.array(is_right, bool))


def make_setting(low_bit, method="ClusterQAT", base="base", **values):
    defaults = {"clusters": 8, "granularity": "per_tensor", "rate": 0.002, "distill": True, "edge_clusters": 256}
    return low_bit.fine_tunings.Setting(base, method, **defaults | values)


class FakeFineTunings:
    """Results by a function of the setting; remembers the settings."""

    def __init__(self, compute):
        self._compute = compute
        self.settings = set()

    def measure(self, setting):
        self.settings.add(setting)
        return self._compute(setting)

    def rates(self, method, clusters, granularity="per_tensor"):
        return {
            setting.rate
            for setting in self.settings
            if (setting.method, setting.clusters, setting.granularity) == (method, clusters, granularity)
        }


def test_results_come_back_from_their_record(low_bit):
    Result = low_bit.fine_tunings.Result
    result = Result(np.random.default_rng(0).random(5001) < 0.9, {"agreement_percent": 99.5})
    record = result.as_record()
    restored = Result.from_record(record)
    np.testing.assert_array_equal(restored.is_right, result.is_right)
    assert restored.fidelity == result.fidelity
    assert restored.top1 == result.top1 == pytest.approx(record["top1_percent"], abs=1e-3)


def test_the_interval_is_that_of_paired_differences(low_bit):
    """Images that both networks get right or wrong do not count; a second model halves the weight of each image."""
    estimate_drop = low_bit.paired_statistics.estimate_drop
    before, after = make_result(low_bit, 1, 1, 1, 0), make_result(low_bit, 1, 0, 1, 0)
    drop, half = estimate_drop([before], [after])
    assert drop == 25
    assert half == pytest.approx(100 * 1.96 * np.sqrt(0.25 * 0.75 / 4))
    drop, half_of_two = estimate_drop([before, before], [after, before])
    assert drop == 12.5
    assert half_of_two == pytest.approx(half / 2)
    assert estimate_drop([before], [before]) == (0, 0)


def test_a_result_is_taken_for_its_model_and_flags_only(low_bit, monkeypatch, tmp_path):
    config = tmp_path / "configs" / f"{low_bit.methods.CONFIG}.flags"
    base = tmp_path / "base" / runs.MODEL_NAME
    for folder in (config.parent, base.parent):
        folder.mkdir()
    config.write_text("# three epochs\n--epochs=3\n")
    base.write_bytes(b"weights")
    trained = []

    def train(config, workdir, **flags):
        trained.append((workdir, flags))

    def export(workdir, **_):
        folder = tmp_path / workdir / "export"
        folder.mkdir(parents=True)
        is_float = trained[-1][1]["quantize"] == "float"
        classes = {"float_fused": [1, 1, 1]} if is_float else {"trained_model": [1, 2, 2], "int8.tflite": [1, 2, 0]}
        np.savez(folder / "predictions.npz", labels=[1, 2, 3], **classes)
        file = {"file": "int8.tflite", "agreement_with_trained_model_percent": 66.667}
        content = {"files": [file], "machine": {}, "trained_model_top1_percent": 66.667}
        storage.write_json(folder / "export.json", content)

    for name, value in {"ROOT": tmp_path, "train": train, "export": export}.items():
        monkeypatch.setattr(low_bit.commands, name, value)
    fine_tunings = low_bit.fine_tunings.FineTunings(tmp_path / "kept", "runs", None)

    def measure(method="ClusterQAT"):
        return fine_tunings.measure(make_setting(low_bit, method))

    assert measure().top1 == measure().top1 == pytest.approx(200 / 3)
    assert measure().fidelity == {"agreement_percent": 66.667, "trained_model_top1_percent": 66.667}
    assert len(trained) == 1
    assert measure("float").top1 == pytest.approx(100 / 3)
    base.write_bytes(b"other weights")
    measure()
    config.write_text("# another comment\n--epochs=3\n")
    measure()
    assert len(trained) == 3
    config.write_text("--epochs=4\n")
    measure()
    assert len({workdir for workdir, _ in trained}) == len(trained) == 4
    measure("tfmot")
    (clustered, first), (quantized, second) = trained[-2:]
    assert (first["init_from"], second["init_from"]) == ("base", clustered) and quantized != clustered
    assert first["learning_rate"] == second["learning_rate"] == pytest.approx(0.0001)
    assert first["distill_from"] == second["distill_from"] == "base"


def test_after_divergence_no_image_is_right(low_bit, monkeypatch, tmp_path):
    trained = []

    def train(_, workdir, **__):
        trained.append(workdir)
        raise low_bit.commands.Diverged(3)

    monkeypatch.setattr(low_bit.commands, "train", train)
    (tmp_path / runs.MODEL_NAME).write_bytes(b"weights")
    fine_tunings = low_bit.fine_tunings.FineTunings(tmp_path / "kept", str(tmp_path / "runs"), None)
    setting = make_setting(low_bit, "LSQ", str(tmp_path), rate=1.0, split="validation")
    for _ in range(2):
        result = fine_tunings.measure(setting)
        assert result.top1 == 0 and len(result.is_right) == 5000 and result.has_diverged
    assert len(trained) == 1
    row = {
        "models": ["OABN"],
        "method": "LSQ",
        "states": 8,
        "granularity": "per_tensor",
        "drop": 90,
        "half_interval": 0,
        "reference_top1_percent": [90],
        "integer_top1_percent": [0.0],
        "agreement_percent": [None],
        "trained_model_top1_percent": [None],
        "learning_rates": [1.0],
    }
    table = low_bit.page.make_rows_table([row])
    assert (table.count("| diverged  |"), table.count("| -  ")) == (1, 2)


def test_methods_side_by_side(low_bit):
    """Only where all of them have been measured."""

    def make_row(method, clusters, top1, **lead):
        return {"method": method, "states": clusters, "granularity": "per_tensor", "integer_top1_percent": top1} | lead

    rows = [
        make_row("ClusterQAT", 8, [87.5, 0.0]),
        make_row("LSQ", 8, [87.0, 86.0], clusterqat_ahead=-2.5, clusterqat_ahead_half_interval=0.25),
        make_row("ClusterQAT", 4, [80.0]),
    ]
    header, _, line = low_bit.page.make_lead_table(rows).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (header, line)]
    assert cells[0] == ["clusters", "weights", "ClusterQAT", "LSQ", "lead over LSQ"]
    assert cells[1] == ["8", "per tensor", "87.50 / diverged", "87.00 / 86.00", "-2.50 ± 0.25"]


def test_the_figure(low_bit, tmp_path):
    """Drawn from any rows; drops reach the bottom of the figure."""
    import matplotlib.pyplot as plt

    def make_row(method, clusters, granularity, drop, model="OABN"):
        row = {"method": method, "states": clusters, "granularity": granularity, "models": [model]}
        return row | {"drop": drop, "integer_top1_percent": [88.0 - drop]}

    record = {
        "headline": [make_row("ClusterQAT", clusters, "per_tensor", 8 / clusters) for clusters in (4, 16, 8)],
        "peers": [make_row("LSQ", 4, "per_channel", 1.0)],
        "others": [make_row("ClusterQAT", 4, "per_tensor", 50.0, "BN")],
    }
    points = low_bit.figure.find_points(record["headline"], "ClusterQAT", "per_tensor", "OABN")
    assert points == ([4, 8, 16], [2, 1, 0.5])
    low_bit.figure.draw(record, tmp_path / "picture.png")
    assert plt.imread(tmp_path / "picture.png").shape[0] > 300
    assert not plt.get_fignums()


def test_flags_of_each_method(low_bit):
    def make_trainings(method):
        return low_bit.methods.METHODS[method].make_trainings({"stem": 256, ".*": 8}, "per_tensor")

    assert make_trainings("ClusterQAT")[0]["number_of_clusters"] == "stem=256,.*=8"
    assert make_trainings("LSQ")[0]["weight_bits"] == "stem=8,.*=3"
    assert make_trainings("tfmot")[0]["number_of_clusters"] == "stem=256,.*=8"
    assert [training["epochs"] for training in make_trainings("tfmot")] == [1, 2]


@pytest.mark.parametrize("gain", [-1, 1])
def test_choices(low_bit, gain):
    """The best of the middle of the grid and beyond, with the teacher if that is better, measured when needed."""

    def compute(setting):
        best = {"ClusterQAT": 0.008, "float": 0.002}.get(setting.method, 0.032 if setting.clusters == 8 else 0.008)
        right = 8 + gain * setting.distill if setting.rate == best else 6
        return make_result(low_bit, *[1] * right, *[0] * 5)

    fine_tunings = FakeFineTunings(compute)
    choices = low_bit.learning_rates.Choices(fine_tunings, "base")
    assert choices.distill == choices.as_record()["distill"] == (gain > 0)
    assert [choices.find_rate("ClusterQAT", clusters, "per_tensor") for clusters in (16, 8, 5)] == [0.008] * 3
    assert fine_tunings.rates("ClusterQAT", 8) == {0.002, 0.008, 0.032} and len(fine_tunings.settings) == 2 * 3
    rates = [choices.find_rate("LSQ", clusters, "per_channel") for clusters in (16, 8, 5, 4, 3)]
    assert rates == [0.032] * 3 + [0.008] * 2
    assert choices.find_rate("float", 0, "per_tensor") == 0.002
    assert {setting.clusters for setting in fine_tunings.settings if setting.method == "float"} == {0}
    assert fine_tunings.rates("LSQ", 8) == {0.008, 0.032, 0.128}
    assert len(fine_tunings.settings) == 5 * 3
    assert {setting.split for setting in fine_tunings.settings} == {"validation"}
    choices.compare("LSQ", 8, "per_channel")
    assert fine_tunings.rates("LSQ", 8, "per_channel") == {0.008, 0.032}
    top1 = choices.as_record()["validation_top1_percent"]
    assert ("LSQ, 4 states, per tensor, distilled" in top1) == (gain > 0)
    assert len(top1["ClusterQAT, 8 states, per tensor"]) == 3


def measure_all(low_bit, fine_tunings, bases=None):
    """Runs the recipe of the program; returns the record."""
    models = low_bit.models.OABN_MODELS | low_bit.models.OTHER_MODELS
    bases = bases or models
    choices = low_bit.learning_rates.Choices(fine_tunings, bases.get("validation", "validation"))
    record = {"choices": choices.as_record(), **{part: [] for part in low_bit.page.PARTS}}
    rows = low_bit.rows.Rows(fine_tunings, choices, bases)
    low_bit.program.measure(rows, choices, record, write=lambda: None)
    return record


def test_every_row_is_measured(low_bit):
    """With the chosen learning rate, or the first below it that does not diverge."""

    def compute(setting):
        diverges = setting.rate > 0.01 and ("qarepvgg" in setting.base or setting.method == "ClusterQAT, seed 2")
        right = 0 if diverges else 8 if setting.method == "float" else 7 if setting.rate == 0.032 else 6
        fidelity = {"agreement_percent": 100.0, "trained_model_top1_percent": 70.0}
        return low_bit.fine_tunings.Result(np.arange(9) < right, fidelity)

    record = measure_all(low_bit, FakeFineTunings(compute))
    counts = {"headline": 8, "peers": 18, "common_rate": 1, "edges": 4, "others": 6}
    assert {part: len(record[part]) for part in low_bit.page.PARTS} == counts
    assert all(len(row["integer_top1_percent"]) == 2 for row in record["headline"] + record["peers"])
    rates = {row["models"][0]: row["learning_rates"] for row in record["others"]}
    assert rates == {"BN": [0.032], "QARepVGG": [0.008], "no identity branch": [0.032]}
    assert {row["learning_rates"][0] for row in record["peers"] if row["method"] == "tfmot"} == {0.05 * 0.032}
    own_rows = {(row["states"], row["granularity"]): row for row in record["peers"] if row["method"] == "ClusterQAT"}
    assert {key for key, row in own_rows.items() if row["learning_rates"] != [0.032] * 2} == {(16, "per_channel")}
    assert own_rows[16, "per_channel"]["learning_rates"] == [0.008] * 2
    assert record["common_rate"][0]["learning_rates"] == [0.032] * 2
    ahead = {(row["states"], row["granularity"]) for row in record["peers"] if row["clusterqat_ahead"]}
    assert ahead == {(16, "per_channel")}
    top1 = record["choices"]["validation_top1_percent"]
    assert set(top1["ClusterQAT with trained centroids, 16 states, per channel"]) == {"0.008", "0.032"}


def test_with_all_results_kept_nothing_is_trained(low_bit, monkeypatch):
    """The committed fine-tunings are found by their base models and flags, and give the committed rows and page."""

    def refuse(*arguments, **flags):
        raise AssertionError(f"would run {arguments}, {flags}")

    monkeypatch.setattr(low_bit.commands, "train", refuse)
    monkeypatch.setattr(low_bit.commands, "export", refuse)
    fine_tunings = low_bit.fine_tunings.FineTunings(ROOT / "results" / "low_bit", "runs", None)
    models = low_bit.models.OABN_MODELS | low_bit.models.OTHER_MODELS | {"validation": low_bit.models.VALIDATION_MODEL}
    bases = {title: str(CHECKPOINTS / config) for title, config in models.items()}
    record = measure_all(low_bit, fine_tunings, bases)
    committed = json.loads((ROOT / "results" / "low_bit.json").read_text(encoding="utf-8"))
    assert record == committed
    page = (ROOT / "results" / "low_bit.md").read_text(encoding="utf-8")
    assert low_bit.page.render(record) == page.rstrip()


def test_files_compute_as_trained(low_bit):
    """ClusterQAT and LSQ on all 10,000 test images, as far as results/low_bit.json has them and none diverged."""
    record = json.loads((ROOT / "results" / "low_bit.json").read_text(encoding="utf-8"))
    rows = [row for part in low_bit.page.PARTS for row in record[part] if row["method"] in ("ClusterQAT", "LSQ")]
    assert rows
    for row in rows:
        columns = (row["integer_top1_percent"], row["agreement_percent"], row["trained_model_top1_percent"])
        for top1, agreement, trained in zip(*columns, strict=True):
            if top1:
                assert agreement >= (99.5 if row["states"] >= 8 else 99.0), row
                assert abs(top1 - trained) <= 0.15, row
