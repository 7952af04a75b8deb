"""The published recipe on a synthetic dataset with the name, features and splits of ImageNet."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tf_repvgg.data import ClassificationData, Preprocessing, sources

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("imagenet_*.flags"))
RECIPE = {
    "--dataset=imagenet2012",
    "--novalidation",
    "--padding=symmetric",
    "--image_size=224",
    "--crop=random_resized",
    "--evaluation_resize=256",
    "--normalization=imagenet",
    "--epochs=120",
    "--batch_size=256",
    "--learning_rate=0.1",
    "--warmup_epochs=0",
    "--momentum=0.9",
    "--nonesterov",
    "--weight_decay=1e-3",  # (1 - 0.9) * 1e-3 is PyTorch's 1e-4
    "--seed=0",
}


class Synthetic(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """JPEGs of varying size; the test split has no labels, like that of ImageNet."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=[f"n{index:08}" for index in range(1000)]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(40, 0),
            "validation": self._generate_examples(6, 100),
            "test": self._generate_examples(5, None),
        }

    def _generate_examples(self, count, first_label):
        for index in range(count):
            generator = np.random.default_rng(index)
            image = generator.integers(0, 256, (*generator.integers(60, 120, 2), 3), np.uint8)
            label = -1 if first_label is None else first_label + index
            yield index, {"image": image, "label": label, "file_name": f"{label}_{index}.JPEG"}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    Synthetic(data_dir=str(folder)).download_and_prepare()
    return str(folder)


@pytest.mark.parametrize("config", ["imagenet_a0_bn", "imagenet_b0_oabn"])
def test_the_recipe_trains(imagenet, run_forked, tmp_path, config, pytestconfig):
    """20 steps; only batch and images are smaller than published."""
    if config != "imagenet_a0_bn" and not pytestconfig.getoption("full_width"):
        pytest.skip("differs in depth and normalization, which tests of the blocks train; --full_width trains it")
    result = run_forked(
        "train/main.py",
        f"--flagfile=configs/{config}.flags",
        f"--data_dir={imagenet}",
        f"--workdir={tmp_path}",
        "--epochs=1",
        "--steps_per_epoch=20",
        "--batch_size=2",
        "--image_size=40",
        "--evaluation_resize=46",
    )
    assert result.status == 0, result.stderr[-3000:]
    assert "20/20" in result.stderr
    assert "validation" not in result.stdout and "test split (6 images)" in result.stdout
    (epoch,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(epoch["loss"])  # at the rate for 256 images, which is large
    metadata = json.loads((tmp_path / "input.json").read_text())
    assert metadata["mean"] == [123.675, 116.28, 103.53] and metadata["std"] == [58.395, 57.12, 57.375]
    assert (metadata["size"], metadata["resize_shorter_side"], len(metadata["labels"])) == ([40, 40], 46, 1000)


def test_only_splits_with_labels_are_used(imagenet):
    data = ClassificationData("imagenet2012", imagenet, Preprocessing((24, 24)), hold_out=False)
    assert [data.num_examples(split) for split in ("train", "test")] == [40, 6]
    assert [label for _, label in data.images("test").as_numpy_iterator()] != [-1] * 5
    assert data.num_classes == 1000


def test_a_dataset_that_must_be_downloaded_manually(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"TFDS cannot download and prepare the dataset 'imagenet2012' by itself: .*manual"
    ):
        sources.TfdsSource("imagenet2012")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_hold_the_published_recipe(path):
    comment, flags = (
        {line for line in path.read_text().splitlines() if line.startswith("#") is is_comment}
        for is_comment in (True, False)
    )
    _, variant, norm = path.stem.split("_")
    oabn = {"--norm=oabn", "--oabn_k=0.1"} if norm == "oabn" else set()
    assert flags == RECIPE | {f"--variant={variant.upper()}"} | oabn
    assert any("NOT TRAINED HERE" in line for line in comment)
    assert any(f"--flagfile=configs/{path.name}" in line for line in comment)


def test_every_variant_has_its_configs():
    assert [path.stem.removeprefix("imagenet_") for path in CONFIGS] == ["a0_bn", "a0_oabn", "b0_bn", "b0_oabn"]
