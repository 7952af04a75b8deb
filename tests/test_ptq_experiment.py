"""The table of PTQ methods: cells as they are measured, both toolkits on one footing, and going on where it ended."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.networks import random_images, small_repvgg

from tf_repvgg import runs, storage, tflite

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def experiments():
    """The folder's modules, importable as its programs import them."""
    sys.path.insert(0, str(ROOT / "experiments"))
    yield
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def workdir(trained_digits, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits_oabn"
    folder.mkdir()
    trained_digits.save(folder / runs.MODEL_NAME)
    storage.write_json(folder / runs.INPUT_NAME, digits.facts())
    storage.write_json(folder / "result.json", {"test_top1_percent": 1.0})
    return folder


@pytest.mark.parametrize("bits, largest", [(8, 128), (4, 8)])
@pytest.mark.parametrize("algorithm", ["min_max", "mse", "octav"])
def test_files_of_ai_edge_quantizer(experiments, algorithm, bits, largest):
    """Fully integer, of the asked width and granularity, and the same outputs however the codes are stored."""
    from harness.ptq import ai_edge

    pytest.importorskip("ai_edge_quantizer")
    model, batch = small_repvgg(), random_images(16)
    for per_channel in (False, True):
        file = ai_edge.quantize(tflite.convert_float(model), algorithm, bits, per_channel, batch)
        assert [operator.name for operator in tflite.operators(file)] == ["CONV_2D"] * 2 + ["MEAN", "FULLY_CONNECTED"]
        for kernel, channels in zip(tflite.weight_codes(file), (8, 8, 5), strict=True):
            assert len(kernel.scale) == (channels if per_channel else 1)
            assert np.max(np.abs(kernel.codes.astype(int))) in range(largest // 8, largest + 1)
        stored = ai_edge.stored_as_int8(file)
        for mine, its in zip(tflite.weight_codes(stored), tflite.weight_codes(file), strict=True):
            np.testing.assert_array_equal(mine.codes, its.codes)
            np.testing.assert_array_equal(mine.scale, its.scale)
        plain = [tflite.predict(one, batch, default_delegate=False) for one in (stored, file)]
        np.testing.assert_array_equal(*plain)


def test_float_file_computes_the_model():
    model, batch = small_repvgg(), random_images(4)
    np.testing.assert_allclose(tflite.predict(tflite.convert_float(model), batch), model(batch), rtol=1e-4, atol=1e-5)


def test_a_cell(experiments, workdir, digits_test_split):
    from harness.ptq.cells import Cell, Settings, float_top1_percent, measure, path_of, read

    settings = Settings(None, 64, 300, 4)
    found = {method: measure(Cell(str(workdir), method, 4, "per_channel"), settings) for method in ("mse", "adaround")}
    for method, its in found.items():
        assert its["method"] == method and its["weight_bits"] == 4 and its["granularity"] == "per_channel"
        assert its["top1_percent"] > 80 and its["agreement_with_float_percent"] > 80
        assert its["top1_percent"] * 3 == pytest.approx(round(its["top1_percent"] * 3), abs=0.01)  # of 300 images
    assert found["mse"]["iterations"] is None and found["adaround"]["iterations"] == 4
    assert float_top1_percent(str(workdir), settings) > 90
    cell = Cell(str(workdir), "adaround", 4, "per_channel")
    path = path_of(workdir / "cells", "digits", cell)
    assert read(path, cell.asked(settings)) is None
    path.parent.mkdir(parents=True)
    storage.write_json(path, found["adaround"])
    assert read(path, cell.asked(settings)) == found["adaround"]
    for other in (Settings(None, 65, 300, 4), Settings(None, 64, None, 4), Settings(None, 64, 300, 5)):
        assert read(path, cell.asked(other)) is None
    assert read(path, Cell(str(workdir), "adaround", 3, "per_channel").asked(settings)) is None


def test_the_command_goes_on_and_writes_what_there_is(experiments, workdir, run_program, tmp_path):
    """One cell of two is there already, as if from an interrupted run, and is not measured again."""
    from harness.ptq.cells import Cell, Settings, path_of

    cell = Cell(str(workdir), "min_max", 4, "per_channel")
    kept = {"top1_percent": 12.25, "quantization_seconds": 1.0, "notes": ["kept"]}
    path = path_of(tmp_path / "cells", "digits_oabn", cell)
    path.parent.mkdir(parents=True)
    storage.write_json(path, cell.asked(Settings(None, 32, 100, 500)) | kept)
    result = run_program(
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
    assert result.returncode == 0, result.stderr[-3000:]
    measured, again = json.loads((tmp_path / "ptq.json").read_text())["models"]["digits_oabn"]["cells"]
    assert measured["granularity"] == "per_tensor" and measured["top1_percent"] > 50
    assert again["granularity"] == "per_channel" and kept.items() <= again.items()
    page = (tmp_path / "ptq.md").read_text()
    assert f"| min_max  | {measured['top1_percent']:.1f} / 12.2 |" in page and page.rstrip() in result.stdout


def test_page(experiments):
    """Comparisons and targets out of the cells, by hand."""
    from harness.ptq import page as ptq_tables

    def cell(method, bits, granularity, top1):
        place = {"method": method, "weight_bits": bits, "granularity": granularity}
        return place | {"top1_percent": top1, "quantization_seconds": 2.0, "notes": [f"{method} did"]}

    cells = [
        cell("min_max", 8, "per_tensor", 89.9),
        cell("mse", 8, "per_tensor", 89.7),
        cell("mse", 4, "per_channel", 88.0),
        cell("octav", 4, "per_channel", 85.9),
        cell("adaquant", 4, "per_channel", 89.5),
        cell("ai-edge-quantizer min_max", 8, "per_tensor", 89.5),
        cell("ai-edge-quantizer mse", 4, "per_channel", 88.4),
        cell("ai-edge-quantizer octav", 4, "per_channel", 86.0),
    ]
    models = {"an_oabn": {"float_top1_percent": 90.0, "cells": cells, "training": {}}}
    found = {(one["kind"], one["weight_bits"]): (one["ours"], one["theirs"]) for one in ptq_tables.comparable(models)}
    assert found == {
        ("min_max / min_max", 8): (89.9, 89.5),
        ("best", 8): (89.9, 89.5),
        ("mse / mse", 4): (88.0, 88.4),
        ("octav / octav", 4): (85.9, 86.0),
        ("best", 4): (89.5, 88.4),
    }
    settings = {"calibration_images": 8, "test_images": None, "iterations": 5}
    page = ptq_tables.page({"models": models | {"empty": {"cells": []}}, "settings": settings, "workers": 2})
    page = re.sub(" +", " ", page)  # without the tables' columns
    assert "Cells of like methods in which ours is behind by more than 0.3 points: 1 of 3." in page
    assert "- mse / mse, an_oabn, 4 bit per channel: 88.00 against 88.40" in page
    assert "an_oabn, 8 bit per tensor, worst method: points below FP32 | mse | 0.30 | 0.2 |" in page
    assert "an_oabn, 4 bit per channel, best method: points below FP32 | adaquant | 0.50 | 1.0 |" in page
    assert "| an_oabn | 90.0 | 89.9 min_max / | / 89.5 adaquant |" in page
    assert "| min_max | 89.9 / |" in page and "- mse: mse did" in page
