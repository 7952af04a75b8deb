"""Random models on every way to a file: right, or refused before any work; and the judge itself, on wrong files."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import tflite

# Seeds in groups, so that a failure names few models and no test takes long.
GROUPS = [range(start, start + 10) for start in range(0, 60, 10)]


@pytest.mark.parametrize("seeds", GROUPS, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_random_models_are_right_or_refused(experiments, seeds):
    from harness.any_model import judge, sweep

    records = [record for seed in seeds for record in sweep.judge_seed(seed, ways=1, images=12)]
    faults = [record for record in records if record["outcome"] in judge.FAULTS]
    assert not faults, "\n".join(f"seed {fault['seed']}, {fault['way']}: {fault['detail']}" for fault in faults)
    assert sum(record["outcome"] == judge.RIGHT for record in records) >= 5


def test_a_seed_gives_one_model(experiments):
    """The same seed the same model, whatever ran before; all parts and heads come up."""
    from harness.any_model.heads import HEADS
    from harness.any_model.parts import PARTS
    from harness.any_model.random_models import make_random_model
    from harness.any_model.ways import WAYS, choose_ways

    first, _, again = make_random_model(1, 4), make_random_model(2, 4), make_random_model(1, 4)
    assert first.parts == again.parts
    for expected, actual in zip(first.outputs, again.outputs, strict=True):
        np.testing.assert_array_equal(expected, actual)
    assert len(PARTS) >= 30 and len(HEADS) == 10
    assert {way for seed in range(60) for way in choose_ways(seed, 1)} == set(WAYS)


@pytest.fixture
def offset_model():
    """A convolution, a constant and a classifier, with images."""
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.Conv2D(6, 3, activation="relu", name="conv")(inputs) + 2.0
    outputs = keras.layers.Dense(4, name="logits")(keras.layers.GlobalAveragePooling2D()(features))
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype("float32")
    return keras.Model(inputs, outputs), [images]


def run_judge(model, images, way):
    from harness.any_model import judge
    from harness.any_model.random_models import run_model

    return judge.judge(model, images, run_model(model, images), way)


@pytest.mark.parametrize("way", ["convert", "min_max"])
def test_the_judge_notices_a_file_that_departs(experiments, offset_model, monkeypatch, way):
    """A file of the model with other biases."""
    model, images = offset_model
    assert run_judge(model, images, way).outcome == "right"
    convert = tflite.convert

    def convert_another(quantized, calibration=None):
        layer = quantized.get_layer("logits")
        kept = layer.bias.numpy()
        layer.bias.assign(kept + np.float32(0.5))
        file = convert(quantized, calibration)
        layer.bias.assign(kept)
        return file

    monkeypatch.setattr(tflite, "convert", convert_another)
    verdict = run_judge(model, images, way)
    assert verdict.outcome == "wrong" and re.search(r"steps|error", verdict.detail)
    assert verdict.error > 2 * verdict.error_allowed


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (tflite.WrongFileError("the file departs"), "wrong"),
        (ValueError("not raised by the library"), "crashed"),
        (TypeError("unhashable type"), "crashed"),
    ],
)
def test_other_errors_are_faults(experiments, offset_model, monkeypatch, error, outcome):
    def fail(*_):
        raise error

    monkeypatch.setattr(tflite, "convert", fail)
    verdict = run_judge(*offset_model, "min_max")
    assert verdict.outcome == outcome and str(error).split()[0] in verdict.detail


def test_a_refusal_after_quantization_is_late(experiments, offset_model, monkeypatch):
    convert = tflite.convert
    monkeypatch.setattr(tflite, "convert", lambda quantized: convert(quantized, inference_type="int4"))
    verdict = run_judge(*offset_model, "min_max")
    assert verdict.outcome == "refused late" and "'int4'" in verdict.detail


def test_a_refusal_is_counted_by_its_reason(experiments):
    from harness.any_model import judge

    layers = [keras.layers.Reshape((8, 24)), keras.layers.LSTM(3, name="memory"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    images = [np.zeros((4, 8, 8, 3), np.float32)]
    verdict = run_judge(model, images, "min_max")
    assert verdict.outcome == "refused" and "'memory'" in verdict.detail
    assert judge.shorten_reason("layer 'a' has -3 of 1.5e-3, 'b'") == "layer '...' has N of N, '...'"


def test_weights_on_other_grids_than_promised_are_noticed(experiments, offset_model, monkeypatch):
    from harness.any_model.ways import WAYS

    eight_bits = WAYS["min_max"]
    monkeypatch.setitem(WAYS, "min_max", eight_bits._replace(largest_code=7))
    verdict = run_judge(*offset_model, "min_max")
    assert verdict.outcome == "wrong" and "beyond 7" in verdict.detail


def test_photographs_come_from_all_classes(experiments, tmp_path):
    from harness.any_model import applications

    for number, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / name).mkdir()
        for index in range(number + 1):
            pixels = np.full((20, 30, 3), 80 * number, np.uint8)
            (tmp_path / name / f"{index}.JPEG").write_bytes(tf.io.encode_jpeg(pixels, quality=100).numpy())
    photographs = applications.load_photographs(tmp_path, 5)
    assert photographs.shape == (5, 96, 96, 3)
    assert [round(float(image.mean()) / 80) for image in photographs] == [0, 1, 2, 1, 2]
    with pytest.raises(FileNotFoundError, match="has 6 photographs"):
        applications.load_photographs(tmp_path, 7)


def test_page(experiments):
    """Counts, reasons, faults and the comparison with TensorFlow, by hand."""
    from harness.any_model import page, sweep

    def make_record(seed, outcome, **values):
        blank = {"detail": "", "steps": None, "steps_allowed": None, "error": None, "error_allowed": None}
        return {"seed": seed, "way": "convert", "parts": ["conv"], "outcome": outcome} | blank | values

    records = [
        make_record(0, "right", steps=1.0, steps_allowed=4.0, error=0.01, error_allowed=0.04),
        make_record(1, "right", steps=3.0, steps_allowed=4.0, error=0.02, error_allowed=0.04),
        make_record(2, "refused", detail="layer 'a' is a LSTM"),
        make_record(3, "refused", detail="layer 'b' is a LSTM"),
        make_record(4, "wrong", detail="the file differs"),
    ]
    random = {"first_seed": 0, "ways_per_model": 1} | sweep.summarize(records)
    ways = {"TensorFlow": {"agreement_percent": 80.0}, "min_max": {"agreement_percent": 75.0}}
    low = {"mse": {"agreement_percent": 74.5}, "ClusterQAT": {"refused": "layer 'x' is a LSTM"}}
    networks = {"MobileNet": {"classes": 10, "tolerance": 1e-4, "ways": ways | low}}
    applications = {"calibration_images": 8, "test_images": 20, "networks": networks}
    record = {"random": random, "applications": applications}
    text = re.sub(" +", " ", page.render(record))
    assert "| convert | 2 | 2 | 1 | 0 | 0 |" in text and "| all | 2 | 2 | 1 | 0 | 0 |" in text
    assert "| 2 | layer '...' is a LSTM |" in text and "- convert, seed 4: the file differs" in text
    assert "2.0 steps" in text and "75 % of what is accepted" in text
    assert "| MobileNet | 80.0 | 75.0 | 74.5 | refused |" in text
    assert page.list_faults(record) == [
        "random model 4, convert: wrong: the file differs",
        "MobileNet, mse: agrees on 74.5 %, 75.0 expected",
    ]


def test_finished_pieces_are_not_judged_again(experiments, monkeypatch, tmp_path):
    from harness.any_model import sweep

    from tf_repvgg.storage import FinishedWork

    judged = []

    def judge_seed(seed, ways):
        judged.append(seed)
        return [{"seed": seed, "way": "convert"}]

    monkeypatch.setattr(sweep, "judge_seed", judge_seed)
    monkeypatch.setattr(sweep, "hash_sources", lambda: "unchanged")
    kept = FinishedWork(tmp_path)
    assert len(sweep.judge_seeds(range(25), 1, kept)) == 25
    assert len(sweep.judge_seeds(range(25), 1, kept)) == 25 and len(judged) == 25
    assert len(sweep.judge_seeds(range(25), 2, kept)) == 25 and len(judged) == 50
