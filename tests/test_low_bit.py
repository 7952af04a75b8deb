"""The experiment on few states: intervals, the record it goes on from, and what each method is asked for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_repvgg import runs, storage

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def low_bit():
    sys.path.insert(0, str(ROOT / "experiments"))
    import low_bit

    yield low_bit
    sys.path.remove(str(ROOT / "experiments"))


def answers(low_bit, *is_right):
    return low_bit.Result(np.array(is_right, bool))


def test_results_come_back_from_their_record(low_bit):
    result = low_bit.Result(np.random.default_rng(0).random(5001) < 0.9, {"agreement_percent": 99.5})
    record = result.as_record()
    found = low_bit.Result.from_record(record)
    np.testing.assert_array_equal(found.is_right, result.is_right)
    assert found.fidelity == result.fidelity
    assert found.top1 == result.top1 == pytest.approx(record["top1_percent"], abs=1e-3)


def test_the_interval_is_that_of_paired_differences(low_bit):
    """Images that both networks get right or wrong have no part in it; a second model halves what each image says."""
    before, after = answers(low_bit, 1, 1, 1, 0), answers(low_bit, 1, 0, 1, 0)
    drop, half = low_bit.drop_and_interval([before], [after])
    assert drop == 25
    assert half == pytest.approx(100 * 1.96 * np.sqrt(0.25 * 0.75 / 4))
    drop, half_of_two = low_bit.drop_and_interval([before, before], [after, before])
    assert drop == 12.5
    assert half_of_two == pytest.approx(half / 2)
    assert low_bit.drop_and_interval([before], [before]) == (0, 0)


def test_a_record_is_used_for_the_model_and_the_flags_that_it_is_of(low_bit, monkeypatch, tmp_path):
    config = tmp_path / "configs" / f"{low_bit.CONFIG}.flags"
    base = tmp_path / "base" / runs.MODEL_NAME
    for folder in (config.parent, base.parent):
        folder.mkdir()
    config.write_text("# three epochs\n--epochs=3\n")
    base.write_bytes(b"one")
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
        report = {"files": [file], "machine": {}, "trained_model_top1_percent": 66.667}
        storage.write_json(folder / "export.json", report)

    for name, value in {"ROOT": tmp_path, "write": lambda record: None, "train": train, "export": export}.items():
        monkeypatch.setattr(low_bit, name, value)
    if not low_bit.FLAGS.is_parsed():
        low_bit.FLAGS.mark_as_parsed()
    record = {"fine_tunings": {}}

    def tune(method="ClusterQAT"):
        return low_bit.fine_tune(record, method, "base", 8, "per_tensor", 0.002, True, edges=256)

    assert tune().top1 == tune().top1 == pytest.approx(200 / 3)
    assert tune().fidelity == {"agreement_percent": 66.667, "trained_model_top1_percent": 66.667}
    assert len(trained) == 1
    assert tune("float").top1 == pytest.approx(100 / 3)
    base.write_bytes(b"another")
    tune()
    config.write_text("# another comment\n--epochs=3\n")
    tune()
    assert len(trained) == 3
    config.write_text("--epochs=4\n")
    tune()
    assert len({workdir for workdir, _ in trained}) == len(trained) == 4
    tune("tfmot")
    (clustered, first), (quantized, second) = trained[-2:]
    assert (first["init_from"], second["init_from"]) == ("base", clustered) and quantized != clustered
    assert first["learning_rate"] == second["learning_rate"] == pytest.approx(0.0001)
    assert first["distill_from"] == second["distill_from"] == "base"


def test_what_diverged_is_right_of_no_image(low_bit, monkeypatch, tmp_path):
    def train(*_, **__):
        raise low_bit.Diverged(3)

    for name, value in {"write": lambda record: None, "train": train}.items():
        monkeypatch.setattr(low_bit, name, value)
    monkeypatch.setattr(low_bit.runs, "model_sha256", lambda workdir: "of the base")
    if not low_bit.FLAGS.is_parsed():
        low_bit.FLAGS.mark_as_parsed()
    record = {"fine_tunings": {}}
    for _ in range(2):
        result = low_bit.fine_tune(record, "LSQ", str(tmp_path), 8, "per_tensor", 1.0, False, split="validation")
        assert result.top1 == 0 and len(result.is_right) == 5000
        monkeypatch.setattr(low_bit, "train", None)
    row = {
        "models": ["OABN"],
        "method": "LSQ",
        "states": 8,
        "granularity": "per_tensor",
        "drop": 90,
        "half_interval": 0,
    }
    row |= {"reference_top1_percent": [90], "integer_top1_percent": [0.0]}
    row |= {"agreement_percent": [None], "trained_model_top1_percent": [None], "learning_rates": [1.0]}
    assert (low_bit._table([row]).count("| diverged  |"), low_bit._table([row]).count("| -  ")) == (1, 2)


def test_methods_side_by_side(low_bit):
    """Only where all have been measured."""

    def row(method, states, top1, **more):
        return {"method": method, "states": states, "granularity": "per_tensor", "integer_top1_percent": top1} | more

    rows = [
        row("ours", 8, [87.5, 0.0]),
        row("LSQ", 8, [87.0, 86.0], clusterqat_ahead=-2.5, clusterqat_ahead_half_interval=0.25),
    ]
    header, _, line = low_bit._comparison([*rows, row("ours", 4, [80.0])]).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in (header, line)]
    assert cells[0] == ["states", "weights", "ours", "LSQ", "ahead of LSQ"]
    assert cells[1] == ["8", "per tensor", "87.50 / diverged", "87.00 / 86.00", "-2.50 ± 0.25"]


def test_the_picture(low_bit, tmp_path):
    """Drawn of whatever rows there are; drops reach the figure's bottom."""
    import low_bit_figure
    import matplotlib.pyplot as plt

    def row(method, states, granularity, drop, model="OABN"):
        facts = {"method": method, "states": states, "granularity": granularity, "models": [model]}
        return facts | {"drop": drop, "integer_top1_percent": [88.0 - drop]}

    record = {"headline": [row("ClusterQAT", states, "per_tensor", 8 / states) for states in (4, 16, 8)]}
    record |= {"peers": [row("LSQ", 4, "per_channel", 1.0)], "others": [row("ClusterQAT", 4, "per_tensor", 50.0, "BN")]}
    assert low_bit_figure._points(record["headline"], "ClusterQAT", "per_tensor", "OABN") == ([4, 8, 16], [2, 1, 0.5])
    low_bit_figure.draw(record, tmp_path / "picture.png")
    assert plt.imread(tmp_path / "picture.png").shape[0] > 300
    assert not plt.get_fignums()


def test_what_each_method_is_asked_for(low_bit):
    def flags(method, states):
        return low_bit.METHODS[method].runs(states, "per_tensor")

    states = {"stem": 256, ".*": 8}
    assert flags("ClusterQAT", states)[0]["number_of_clusters"] == "stem=256,.*=8"
    assert flags("LSQ", states)[0]["weight_bits"] == "stem=8,.*=3"
    assert flags("tfmot", states)[0]["number_of_clusters"] == "stem=256,.*=8"
    assert [run["epochs"] for run in flags("tfmot", states)] == [1, 2]


@pytest.mark.parametrize("gain", [-1, 1])
def test_choices(low_bit, monkeypatch, gain):
    """The best of the middle of the grid and beyond, with the teacher if that is better, when it is asked for."""
    measured = set()

    def fine_tune(record, method, base, states, granularity, rate, distill, split):
        measured.add((method, states, granularity, rate, distill))
        best = {"ClusterQAT": 0.008, "float": 0.002}.get(method, 0.032 if states == 8 else 0.008)
        return answers(low_bit, *[1] * (8 + gain * distill if rate == best else 6), *[0] * 5)

    def rates(method, states, granularity="per_tensor"):
        return {rate for *asked, rate, _ in measured if asked == [method, states, granularity]}

    for name, value in {"fine_tune": fine_tune, "base_run": str, "write": lambda record: None}.items():
        monkeypatch.setattr(low_bit, name, value)
    record = {"choices": {}}
    choices = low_bit.Choices(record)
    assert choices.distill == record["choices"]["distill"] == (gain > 0)
    assert [choices.rate("ClusterQAT", states, "per_tensor") for states in (16, 8, 5)] == [0.008] * 3
    assert rates("ClusterQAT", 8) == {0.002, 0.008, 0.032} and len(measured) == 2 * 3
    assert [choices.rate("LSQ", states, "per_channel") for states in (16, 8, 5, 4, 3)] == [0.032] * 3 + [0.008] * 2
    assert choices.rate("float", 0, "per_tensor") == 0.002
    assert {states for method, states, *_ in measured if method == "float"} == {0}
    assert rates("LSQ", 8) == {0.008, 0.032, 0.128}
    assert len(measured) == 5 * 3
    choices.compare("a variant", 8, "per_channel")
    assert rates("a variant", 8, "per_channel") == {0.008, 0.032}
    found = record["choices"]["validation_top1_percent"]
    assert ("LSQ, 4 states, per tensor, distilled" in found) == (gain > 0)
    assert len(found["ClusterQAT, 8 states, per tensor"]) == 3


def test_what_is_measured(low_bit, monkeypatch):
    """Every row, with the chosen learning rate, or the first below it that does not diverge."""

    def fine_tune(record, method, base, states, granularity, rate, distill, split="test", edges=None):
        diverges = rate > 0.01 and ("qarepvgg" in base or method == "ClusterQAT, seed 2")
        right = 0 if diverges else 8 if method == "float" else 7 if rate == 0.032 else 6
        fidelity = {"agreement_percent": 100.0, "trained_model_top1_percent": 70.0}
        return low_bit.Result(np.arange(9) < right, fidelity)

    for name, value in {"fine_tune": fine_tune, "base_run": str, "write": lambda record: None}.items():
        monkeypatch.setattr(low_bit, name, value)
    record = {"choices": {}} | {part: [] for part in low_bit.PARTS}
    low_bit.measure(record)
    rows = {"headline": 8, "peers": 18, "common_rate": 1, "edges": 4, "others": 6}
    assert {part: len(record[part]) for part in low_bit.PARTS} == rows
    assert all(len(row["integer_top1_percent"]) == 2 for row in record["headline"] + record["peers"])
    rates = {row["models"][0]: row["learning_rates"] for row in record["others"]}
    assert rates == {"BN": [0.032], "QARepVGG": [0.008], "no identity branch": [0.032]}
    assert {row["learning_rates"][0] for row in record["peers"] if row["method"] == "tfmot"} == {0.05 * 0.032}
    ours = {(row["states"], row["granularity"]): row for row in record["peers"] if row["method"] == "ClusterQAT"}
    assert {key for key, row in ours.items() if row["learning_rates"] != [0.032] * 2} == {(16, "per_channel")}
    assert ours[16, "per_channel"]["learning_rates"] == [0.008] * 2
    assert record["common_rate"][0]["learning_rates"] == [0.032] * 2
    ahead = {(row["states"], row["granularity"]) for row in record["peers"] if row["clusterqat_ahead"]}
    assert ahead == {(16, "per_channel")}
    found = record["choices"]["validation_top1_percent"]
    assert set(found["ClusterQAT with trained centroids, 16 states, per channel"]) == {"0.008", "0.032"}


def test_files_compute_what_was_trained(low_bit):
    """Of ClusterQAT and LSQ on all 10,000 test images, as far as results/low_bit.json has them and none diverged."""
    record = json.loads((ROOT / "results" / "low_bit.json").read_text(encoding="utf-8"))
    rows = [row for part in low_bit.PARTS for row in record[part] if row["method"] in ("ClusterQAT", "LSQ")]
    assert rows
    for row in rows:
        facts = (row["integer_top1_percent"], row["agreement_percent"], row["trained_model_top1_percent"])
        for top1, agreement, trained in zip(*facts, strict=True):
            if top1:
                assert agreement >= (99.5 if row["states"] >= 8 else 99.0), row
                assert abs(top1 - trained) <= 0.15, row
