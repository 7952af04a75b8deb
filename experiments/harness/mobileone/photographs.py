"""Photographs with ImageNet's class numbers: those that settings are chosen on, and those of the last look."""

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from harness.mobileone.network import SIZE

_MEAN = np.float32([0.485, 0.456, 0.406])
_DEVIATION = np.float32([0.229, 0.224, 0.225])
_RESIZE = 256
_IMAGENETTE, _IMAGEWOOF = "imagenette2-224", "imagewoof-val"
# Images that networks trained on ImageNet have not seen.
_UNSEEN = "ILSVRC2012_val_"


class Photographs(NamedTuple):
    """Normalized images [count, 224, 224, 3], and their classes among ImageNet's 1000, [count]."""

    images: np.ndarray
    classes: np.ndarray


class Sets(NamedTuple):
    """Photographs for calibration, and for scores on the classes that calibration shows and on ten others.

    Attributes:
      calibration: Photographs of training images.
      same: Photographs of the classes of `calibration`.
      other: Photographs of classes that `calibration` does not show.
    """

    calibration: Photographs
    same: Photographs
    other: Photographs


def load_validation_sets(data_dir: str | Path, calibration: int = 256, count: int = 500) -> Sets:
    """The sets that settings are chosen on: training images alone; five classes of Imagenette are the other ones."""
    files = [path for path in _list_files(Path(data_dir, _IMAGENETTE, "train")) if _UNSEEN not in path.name]
    folders = sorted({path.parent.name for path in files})
    same, other = ([path for path in files if path.parent.name in part] for part in (folders[0::2], folders[1::2]))
    numbers = read_class_numbers(data_dir, [_IMAGENETTE])
    return Sets(
        _load(same[:calibration], numbers), _load(same[calibration:][:count], numbers), _load(other[:count], numbers)
    )


def load_test_sets(data_dir: str | Path, calibration: int = 256) -> Sets:
    """The sets of the last look, from ImageNet's validation images: 500 of Imagenette's classes, 250 of ten others."""
    root = Path(data_dir)
    training = [path for path in _list_files(root / _IMAGENETTE / "train") if _UNSEEN not in path.name]
    same = [path for part in ("train", "test") for path in _list_files(root / _IMAGENETTE / part)]
    numbers = read_class_numbers(data_dir, [_IMAGENETTE, _IMAGEWOOF])
    return Sets(
        _load(training[:calibration], numbers),
        _load([path for path in same if _UNSEEN in path.name], numbers),
        _load(_list_files(root / _IMAGEWOOF / "test"), numbers),
    )


def read_class_numbers(data_dir: str | Path, datasets: Collection[str]) -> dict[str, int]:
    """{folder of a class: its number among ImageNet's}, from the tables beside the folders of photographs."""
    numbers: dict[str, int] = {}
    for dataset in datasets:
        with Path(data_dir, f"{dataset}.labels.csv").open(encoding="utf-8", newline="") as file:
            numbers |= {row["folder"]: int(row["imagenet_class"]) for row in csv.DictReader(file)}
    return numbers


def _list_files(folder: Path) -> list[Path]:
    """The photographs of a folder of classes, one of each class in turn."""
    classes = [sorted(path.glob("*.JPEG")) for path in sorted(folder.iterdir()) if path.is_dir()]
    rounds = max(map(len, classes))
    return [files[index] for index in range(rounds) for files in classes if index < len(files)]


def _load(paths: Sequence[Path], numbers):
    images = np.stack([_read(path) for path in paths])
    return Photographs(images, np.array([numbers[path.parent.name] for path in paths]))


def _read(path):
    """One photograph as ImageNet's evaluation crops it: shorter side 256 where it is larger than 224, centre 224."""
    pixels = tf.io.decode_jpeg(tf.io.read_file(str(path)), channels=3, dct_method="INTEGER_ACCURATE")
    height, width = pixels.shape[:2]
    if min(height, width) > SIZE:
        ratio = _RESIZE / min(height, width)
        pixels = tf.image.resize(pixels, [round(height * ratio), round(width * ratio)], antialias=True)
    pixels = tf.image.resize_with_crop_or_pad(pixels, SIZE, SIZE)
    return (np.asarray(pixels, np.float32) / 255 - _MEAN) / _DEVIATION
