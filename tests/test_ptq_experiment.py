"""The table of PTQ methods: cells, both toolkits on one footing, and continuing where a run ended."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.networks import random_images, small_repvgg

from tf_repvgg import runs, storage, tflite
from tf_repvgg.storage import FinishedWork

ROOT = Path(__file__).resolve().parents[1]
# As train/main.py writes those of configs/digits_oabn.flags.
SETTINGS = (
    "--dataset=digits --novalidation --crop_padding=1 --variant=digits --block=repvgg --norm=oabn --oabn_k=0.1 "
    "--epochs=30 --batch_size=64 --learning_rate=0.1 --weight_decay=0.005 --seed=0"
)


@pytest.fixture(scope="module")
def workdir(trained_digits, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits_oabn"
    folder.mkdir()
    trained_digits.save(folder / runs.MODEL_NAME)
    storage.write_json(folder / runs.INPUT_NAME, digits.metadata())
    (folder / runs.CONFIG_NAME).write_text(SETTINGS.replace(" ", "\n"))
    return folder


@pytest.mark.parametrize("bits, largest", [(8, 128), (4, 8)])
@pytest.mark.parametrize("algorithm", ["min_max", "mse", "octav"])
def test_files_of_ai_edge_quantizer(experiments, algorithm, bits, largest):
    """Fully integer, of the requested width and granularity, and the same outputs however the codes are stored."""
    from harness.ptq import ai_edge

    pytest.importorskip("ai_edge_quantizer")
    model, batch = small_repvgg(), random_images(16)
    for per_channel in (False, True):
        file = ai_edge.quantize(tflite.convert_float(model), algorithm, bits, per_channel, batch)
        assert [operator.name for operator in tflite.operators(file)] == ["CONV_2D"] * 2 + ["MEAN", "FULLY_CONNECTED"]
        for kernel, channels in zip(tflite.weight_codes(file), (8, 8, 5), strict=True):
            assert len(kernel.scale) == (channels if per_channel else 1)
            assert np.max(np.abs(kernel.codes.astype(int))) in range(largest // 8, largest + 1)
        stored = ai_edge.store_as_int8(file)
        for actual, expected in zip(tflite.weight_codes(stored), tflite.weight_codes(file), strict=True):
            np.testing.assert_array_equal(actual.codes, expected.codes)
            np.testing.assert_array_equal(actual.scale, expected.scale)
        outputs = [tflite.predict(content, batch, default_delegate=False) for content in (stored, file)]
        np.testing.assert_array_equal(*outputs)


def test_float_file_computes_the_model():
    model, batch = small_repvgg(), random_images(4)
    np.testing.assert_allclose(tflite.predict(tflite.convert_float(model), batch), model(batch), rtol=1e-4, atol=1e-5)


def test_a_cell(experiments, workdir, digits_test_split):
    from harness.ptq.cells import Cell, Settings, measure, measure_float

    settings = Settings(None, 64, 300, 4)
    cells = {method: Cell(str(workdir), method, 4, "per_channel") for method in ("mse", "adaround")}
    results = {method: measure(cell, settings) for method, cell in cells.items()}
    for result in results.values():
        assert result["top1_percent"] > 80 and result["agreement_with_float_percent"] > 80
        assert result["top1_percent"] * 3 == pytest.approx(round(result["top1_percent"] * 3), abs=0.01)  # of 300 images
    inputs = {method: cell.find_inputs(settings) for method, cell in cells.items()}
    assert inputs["mse"]["iterations"] is None and inputs["adaround"]["iterations"] == 4
    assert measure_float(str(workdir), settings) > 90
    cell, kept = cells["adaround"], FinishedWork(workdir / "cells")
    assert kept.find(cell.name, inputs["adaround"]) is None
    record = kept.keep(cell.name, inputs["adaround"], results["adaround"])
    assert record["method"] == "adaround" and record["weight_bits"] == 4 and record["granularity"] == "per_channel"
    assert kept.find(cell.name, inputs["adaround"]) == record == inputs["adaround"] | results["adaround"]
    for other in (Settings(None, 65, 300, 4), Settings(None, 64, None, 4), Settings(None, 64, 300, 5)):
        assert kept.find(cell.name, cell.find_inputs(other)) is None
    assert kept.find(cell.name, Cell(str(workdir), "adaround", 3, "per_channel").find_inputs(settings)) is None


def test_committed_cells_are_found(experiments):
    """All cells of the table, by the committed models and the default settings."""
    from harness.ptq.cells import Cell, Settings

    kept, settings = FinishedWork(ROOT / "results" / "ptq"), Settings(None, 1024, None, 500)
    table = json.loads((ROOT / "results" / "ptq.json").read_text(encoding="utf-8"))
    for model, content in table["models"].items():
        workdir = str(ROOT / "results" / "checkpoints" / model)
        for committed in content["cells"]:
            cell = Cell(workdir, committed["method"], committed["weight_bits"], committed["granularity"])
            assert kept.find(f"{model}/{cell.name}", cell.find_inputs(settings)) == committed, cell


def test_the_command_continues_and_writes_all_cells(experiments, workdir, run_forked, tmp_path):
    """One cell of two is kept, as if from an interrupted run, and is not measured again."""
    from harness.ptq.cells import Cell, Settings

    cell = Cell(str(workdir), "min_max", 4, "per_channel")
    result = {"top1_percent": 12.25, "quantization_seconds": 1.0, "notes": ["kept"]}
    inputs = cell.find_inputs(Settings(None, 32, 100, 500))
    FinishedWork(tmp_path / "cells").keep(f"digits_oabn/{cell.name}", inputs, result)
    outcome = run_forked(
        "experiments/ptq.py",
        f"--runs={workdir.parent}",
        f"--cells={tmp_path / 'cells'}",
        f"--results={tmp_path}",
        "--models=digits_oabn",
        "--methods=min_max",
        "--bits=4",
        "--noai_edge",
        "--calibration_images=32",
        "--test_images=100",
        "--workers=1",
    )
    assert outcome.status == 0, outcome.stderr[-3000:]
    measured, kept = json.loads((tmp_path / "ptq.json").read_text())["models"]["digits_oabn"]["cells"]
    assert measured["granularity"] == "per_tensor" and measured["top1_percent"] > 50
    assert kept["granularity"] == "per_channel" and result.items() <= kept.items()
    page = (tmp_path / "ptq.md").read_text()
    assert f"| min_max  | {measured['top1_percent']:.1f} / 12.2 |" in page and page.rstrip() in outcome.stdout


def test_page(experiments):
    """Comparisons and targets from the cells, by hand."""
    from harness.ptq import page

    def make_cell(method, bits, granularity, top1):
        place = {"method": method, "weight_bits": bits, "granularity": granularity}
        return place | {"top1_percent": top1, "quantization_seconds": 2.0, "notes": [f"{method} did"]}

    cells = [
        make_cell("min_max", 8, "per_tensor", 89.9),
        make_cell("mse", 8, "per_tensor", 89.7),
        make_cell("mse", 4, "per_channel", 88.0),
        make_cell("octav", 4, "per_channel", 85.9),
        make_cell("adaquant", 4, "per_channel", 89.5),
        make_cell("ai-edge-quantizer min_max", 8, "per_tensor", 89.5),
        make_cell("ai-edge-quantizer mse", 4, "per_channel", 88.4),
        make_cell("ai-edge-quantizer octav", 4, "per_channel", 86.0),
    ]
    models = {"an_oabn": {"float_top1_percent": 90.0, "cells": cells, "training": {}}}
    compared = {(cell["kind"], cell["weight_bits"]): (cell["ours"], cell["theirs"]) for cell in page.compare(models)}
    assert compared == {
        ("min_max / min_max", 8): (89.9, 89.5),
        ("best", 8): (89.9, 89.5),
        ("mse / mse", 4): (88.0, 88.4),
        ("octav / octav", 4): (85.9, 86.0),
        ("best", 4): (89.5, 88.4),
    }
    settings = {"calibration_images": 8, "test_images": None, "iterations": 5}
    text = page.render({"models": models | {"empty": {"cells": []}}, "settings": settings, "workers": 2})
    text = re.sub(" +", " ", text)  # without the tables' columns
    assert "Cells of like methods in which ours is behind by more than 0.3 points: 1 of 3." in text
    assert "- mse / mse, an_oabn, 4 bit per channel: 88.00 against 88.40" in text
    assert "an_oabn, 8 bit per tensor, worst method: points below FP32 | mse | 0.30 | 0.2 |" in text
    assert "an_oabn, 4 bit per channel, best method: points below FP32 | adaquant | 0.50 | 1.0 |" in text
    assert "| an_oabn | 90.0 | 89.9 min_max / | / 89.5 adaquant |" in text
    assert "| min_max | 89.9 / |" in text and "- mse: mse did" in text
