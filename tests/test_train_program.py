"""train/main.py: its flags, and what it does with a run that exists."""

import json

import numpy as np
import pytest
from PIL import Image

from tf_repvgg import runs

# Programs define their flags when they are imported, so this runs in a process of its own.
COMPARING = """
import fine_tuning
from tf_repvgg.quantization.qat import clustering

for names, members in (
    (fine_tuning.CENTROIDS_INITS[1:], clustering.CentroidInitialization),
    (fine_tuning.GRADIENT_AGGREGATIONS, clustering.GradientAggregation),
):
    assert list(names) == [member.name.lower() for member in members], names
assert fine_tuning.CENTROIDS_INITS[0] == "kmeans"
assert fine_tuning.BATCH_NORM_STATISTICS == tuple(clustering.BATCH_NORM_STATISTICS)
"""


def test_choices_of_flags_are_those_of_the_library(run_forked, tmp_path):
    """The program does not import tfmot to name them."""
    (tmp_path / "comparing.py").write_text(COMPARING)
    outcome = run_forked(tmp_path / "comparing.py", import_from="train")
    assert outcome.status == 0, outcome.stderr[-3000:]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of tiny images in two classes."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (9, 9, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


def test_the_same_command_evaluates_a_run_on_a_folder_again(run_forked, photos, tmp_path):
    """config.flags holds the dataset without its path, which differs between machines."""
    options = ("--image_size=8", "--batch_size=8", "--epochs=1", "--novalidation", f"--workdir={tmp_path / 'run'}")
    command = ("train/main.py", f"--dataset=folder:{photos}/", *options)
    results = []
    for _ in range(2):
        outcome = run_forked(*command)
        assert outcome.status == 0, outcome.stderr[-3000:]
        results.append(json.loads((tmp_path / "run" / runs.RESULT_NAME).read_text()))
    assert results[0] == results[1] and results[0]["images"] == 8
    assert "--dataset=folder:photos" in (tmp_path / "run" / runs.CONFIG_NAME).read_text().splitlines()
    relative = ("train/main.py", "--dataset=folder:photos", f"--data_dir={photos.parent}", *options)
    assert run_forked(*relative, "--evaluate_only").status == 0
    outcome = run_forked("train/main.py", "--dataset=folder:pictures", f"--data_dir={photos.parent}", *options)
    assert outcome.status == 2 and "holds a run with other values of dataset;" in outcome.stderr
