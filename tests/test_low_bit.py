"""The experiment on few states: intervals, the record it goes on from, and what each method is asked for."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tf_repvgg import runs

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
    result = low_bit.Result(np.random.default_rng(0).random(5001) < 0.9)
    record = result.as_record()
    found = low_bit.Result.from_record(record)
    np.testing.assert_array_equal(found.is_right, result.is_right)
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


def test_a_record_is_used_for_the_model_that_it_is_of_and_no_other(low_bit, monkeypatch, tmp_path):
    monkeypatch.setattr(low_bit, "ROOT", tmp_path)
    monkeypatch.setattr(low_bit, "write", lambda record: None)
    trained = []

    def train_and_export(workdir, *_):
        trained.append(workdir)
        export = tmp_path / workdir / "export"
        export.mkdir(parents=True)
        np.savez(
            export / "predictions.npz", labels=[1, 2, 3], **{"clustered.tflite": [1, 2, 0], "float_fused": [1] * 3}
        )
        runs.write_json(export / "export.json", {"files": [{"file": "clustered.tflite"}], "machine": {}})

    monkeypatch.setattr(low_bit, "_train_and_export", train_and_export)
    monkeypatch.setattr(low_bit.FLAGS["runs"], "present", 1)
    base = tmp_path / "base" / runs.MODEL_NAME
    base.parent.mkdir()
    record = {"fine_tunings": {}}

    def tune(method="ClusterQAT"):
        return low_bit.fine_tune(record, method, "base", 8, "per_tensor", 0.002, True, edges=256).top1

    base.write_bytes(b"one")
    assert tune() == tune() == pytest.approx(200 / 3)
    assert len(trained) == 1
    assert tune("float") == pytest.approx(100 / 3)
    base.write_bytes(b"another")
    tune()
    assert len(set(trained)) == len(trained) == 3


def test_what_each_method_is_asked_for(low_bit):
    states = {"stem": 256, ".*": 8}
    assert low_bit.METHODS["ClusterQAT"].flags(states)["number_of_clusters"] == "stem=256,.*=8"
    assert low_bit.METHODS["LSQ"].flags(states)["weight_bits"] == "stem=8,.*=3"
    assert low_bit.METHODS["tfmot"].first(states)["number_of_clusters"] == "stem=256,.*=8"
    choices = {"learning_rates": {"float": 1, "LSQ, 8": 2, "LSQ, 4": 3}}
    rates = [low_bit.rate_for(choices, "LSQ", states) for states in (16, 8, 5, 4, 3)]
    assert rates == [2, 2, 2, 3, 3]
    assert low_bit.rate_for(choices, "float", 0) == 1
