"""One cell of the table of experiments/ptq.py: a model quantized in one way, and its file run over the test split.

Cells are measured in worker processes, one for each core; a worker keeps models and images for its next cells.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import threading
import time

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import logging

from harness.ptq import ai_edge
from tf_repvgg import fusion, provenance, runs, tflite
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.quantization import ptq

AI_EDGE = "ai-edge-quantizer "  # prefix of the methods of that toolkit


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all cells of a table share.

    Attributes:
      data_dir: TFDS data directory; None for TFDS's own.
      calibration_images: Number of training images that methods see.
      test_images: Number of test images; None for the whole split.
      iterations: Steps per layer of methods that learn.
    """

    data_dir: str | None
    calibration_images: int
    test_images: int | None
    iterations: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model, and how it is quantized.

    Attributes:
      workdir: Workdir of the trained model.
      method: Method of `ptq.METHODS`, or several joined by "+"; or `AI_EDGE` followed by a name in
        `ai_edge.ALGORITHMS`.
      bits: Weight width.
      granularity: "per_tensor" or "per_channel".
    """

    workdir: str
    method: str
    bits: int
    granularity: str

    @property
    def name(self) -> str:
        """Name of the cell among those of its model."""
        return f"{self.method.replace('+', '_').replace(' ', '_')}_w{self.bits}_{self.granularity}"

    @property
    def learns(self) -> bool:
        """Whether the method trains."""
        return not self.method.startswith(AI_EDGE) and any(step.learns for step in ptq.parse_method(self.method))

    def find_inputs(self, settings: Settings) -> dict:
        """Everything that the result depends on, except the program itself."""
        return {
            "model_sha256": hash_model(self.workdir),
            "method": self.method,
            "weight_bits": self.bits,
            "granularity": self.granularity,
            "calibration_images": settings.calibration_images,
            "test_images": settings.test_images,
            "iterations": settings.iterations if self.learns else None,
        }


def start_worker() -> None:
    """Prepares a worker process: one core, no messages about every file that TFDS opens, and an end with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.set_verbosity(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def measure(cell: Cell, settings: Settings) -> dict:
    """Quantizes the model of a cell, writes the file and runs it over the test split."""
    fused, data = load_fused(cell.workdir), load_data(cell.workdir, settings)
    per_channel = cell.granularity == "per_channel"
    started, notes = time.monotonic(), []
    if cell.method.startswith(AI_EDGE):
        algorithm = cell.method.removeprefix(AI_EDGE)
        written = ai_edge.quantize(_load_float_file(cell.workdir), algorithm, cell.bits, per_channel, data.calibration)
        seconds, file = time.monotonic() - started, ai_edge.store_as_int8(written)
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
    return {
        "top1_percent": _percent(classes == data.labels),
        "agreement_with_float_percent": _percent(classes == _classify_in_float(cell.workdir, settings)),
        "file_bytes": len(written),
        "quantization_seconds": round(seconds, 1),
        "notes": notes,
        "sources_sha256": provenance.sources_sha256(),
    }


def measure_float(workdir: str, settings: Settings) -> float:
    """Top-1 in percent of the float model."""
    return _percent(_classify_in_float(workdir, settings) == load_data(workdir, settings).labels)


@functools.lru_cache
def hash_model(workdir: str) -> str:
    """The hash of the model in a workdir."""
    return runs.model_sha256(workdir)


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of a model, normalized.

    Attributes:
      calibration: Calibration images, without labels.
      images: Test images.
      labels: Their classes.
      input_range: Lowest and highest value of a normalized image.
    """

    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    input_range: tuple[float, float]


def load_data(workdir: str, settings: Settings) -> Data:
    """The images of the model in a workdir."""
    # By content: models that were trained on the same images share them.
    return _load_images(json.dumps(runs.read_input(workdir)), settings)


@functools.lru_cache(1)
def _load_images(metadata, settings):
    metadata = json.loads(metadata)
    preprocessing = Preprocessing.from_metadata(metadata)
    data = ClassificationData(
        metadata["dataset"], settings.data_dir, preprocessing, hold_out=metadata["validation_held_out"]
    )
    calibration = np.stack(list(data.calibration(settings.calibration_images).as_numpy_iterator()))
    images, labels = map(np.concatenate, zip(*data.evaluation("test").as_numpy_iterator(), strict=True))
    count = settings.test_images
    return Data(calibration, images[:count], labels[:count], preprocessing.range())


@functools.lru_cache(1)
def load_fused(workdir: str) -> keras.Model:
    """The fused model in a workdir."""
    return fusion.fuse(runs.load_model(workdir))


@functools.lru_cache(1)
def _load_float_file(workdir):
    return tflite.convert_float(load_fused(workdir))


@functools.lru_cache(8)
def _classify_in_float(workdir, settings):
    predict = load_fused(workdir).predict
    return np.argmax(predict(load_data(workdir, settings).images, batch_size=250, verbose=0), axis=1)


def _percent(matches):
    return round(100 * float(np.mean(matches)), 3)
