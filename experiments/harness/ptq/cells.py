"""One cell of the table of experiments/ptq.py: a model quantized one way, its file run over the test split.

Cells are measured in worker processes, one for each core; a worker keeps models and images for its next cells.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import logging

from harness.ptq import ai_edge
from tf_repvgg import fusion, provenance, runs, tflite
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.quantization import ptq

AI_EDGE = "ai-edge-quantizer "  # a method that is not ours starts with this
LEARNED_METHODS = ("adaround", "adaquant", "bias_tune")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a table share.

    Attributes:
      data_dir: TFDS data directory; None for TFDS's own.
      calibration_images: training images that methods see.
      test_images: how many are evaluated; None for the whole test split.
      iterations: of methods that learn.
    """

    data_dir: str | None
    calibration_images: int
    test_images: int | None
    iterations: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model by its workdir, and how it is quantized; `ai_edge.ALGORITHMS` with `AI_EDGE` before them are methods."""

    workdir: str
    method: str
    bits: int
    granularity: str

    def asked(self, settings: Settings) -> dict:
        """Everything that the result depends on but the program itself."""
        is_learned = any(name in LEARNED_METHODS for name in self.method.split("+"))
        return {
            "model_sha256": runs.model_sha256(self.workdir),
            "method": self.method,
            "weight_bits": self.bits,
            "granularity": self.granularity,
            "calibration_images": settings.calibration_images,
            "test_images": settings.test_images,
            "iterations": settings.iterations if is_learned else None,
        }


def start_worker():
    """Each worker has one core, does not tell of every file that TFDS opens, and ends when its parent is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.set_verbosity(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def measure(cell: Cell, settings: Settings) -> dict:
    """Quantizes, writes the file and runs it: what was asked and what was found."""
    fused, data = _fused(cell.workdir), _data(cell.workdir, settings)
    per_channel = cell.granularity == "per_channel"
    started, notes = time.monotonic(), []
    if cell.method.startswith(AI_EDGE):
        algorithm = cell.method.removeprefix(AI_EDGE)
        written = ai_edge.quantize(_float_file(cell.workdir), algorithm, cell.bits, per_channel, data.calibration)
        seconds, file = time.monotonic() - started, ai_edge.stored_as_int8(written)
    else:
        model = ptq.quantize(
            fused,
            cell.method,
            cell.bits,
            per_channel,
            data.calibration,
            iterations=settings.iterations,
            input_range=data.input_range,
        )
        seconds, notes = time.monotonic() - started, list(model.quantization_notes)
        written = file = tflite.convert(model)
    classes = np.argmax(tflite.predict(file, data.images), axis=1)
    keras.backend.clear_session()  # a worker makes hundreds of models
    return cell.asked(settings) | {
        "top1_percent": _percent(classes == data.labels),
        "agreement_with_float_percent": _percent(classes == _float_classes(cell.workdir, settings)),
        "file_bytes": len(written),
        "quantization_seconds": round(seconds, 1),
        "notes": notes,
        "sources_sha256": provenance.sources_sha256(),
    }


def float_top1_percent(workdir: str, settings: Settings) -> float:
    return _percent(_float_classes(workdir, settings) == _data(workdir, settings).labels)


def path_of(folder: Path, model: str, cell: Cell) -> Path:
    name = cell.method.replace("+", "_").replace(" ", "_")
    return folder / model / f"{name}_w{cell.bits}_{cell.granularity}.json"


def read(path: Path, asked: dict) -> dict | None:
    """A measured cell, if it is there and is just what is asked."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if asked.items() <= found.items() else None


@dataclasses.dataclass(frozen=True)
class _Data:
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    input_range: tuple[float, float]


def _data(workdir, settings):
    return _data_of(json.dumps(runs.read_input(workdir)), settings)


@functools.lru_cache(1)
def _data_of(facts, settings):
    facts = json.loads(facts)
    preprocessing = Preprocessing.from_facts(facts)
    data = ClassificationData(facts["dataset"], settings.data_dir, preprocessing, hold_out=facts["validation_held_out"])
    calibration = np.stack(list(data.calibration(settings.calibration_images).as_numpy_iterator()))
    images, labels = map(np.concatenate, zip(*data.evaluation("test").as_numpy_iterator(), strict=True))
    count = settings.test_images
    return _Data(calibration, images[:count], labels[:count], preprocessing.range())


@functools.lru_cache(1)
def _fused(workdir):
    return fusion.fuse(runs.load_model(workdir))


@functools.lru_cache(1)
def _float_file(workdir):
    return tflite.convert_float(_fused(workdir))


@functools.lru_cache(8)
def _float_classes(workdir, settings):
    predict = _fused(workdir).predict
    return np.argmax(predict(_data(workdir, settings).images, batch_size=250, verbose=0), axis=1)


def _percent(matches):
    return round(100 * float(np.mean(matches)), 3)
