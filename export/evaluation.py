"""Accuracy and latency of models, files and targets on one split of a dataset."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from tf_repvgg import tflite
from tf_repvgg.data import ClassificationData
from tf_repvgg.tflite import targets

# Interpreters of targets are slow: batches small enough for a progress bar that moves, and few timed inferences.
_TARGET_BATCH = 100
_SLOW_RUNS = 10


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Predictions on a split.

    Attributes:
      data: Dataset.
      split: Name of the split.
      labels: Class of each image, [images].
      classes: {name of a model or file: class that it predicts, [images]}.
    """

    data: ClassificationData
    split: str
    labels: np.ndarray
    classes: dict[str, np.ndarray]

    def top1_percent(self, name: str) -> float:
        """Accuracy of a model or file."""
        return _percent(self.classes[name] == self.labels)

    def agreement_percent(self, name: str, other_name: str) -> float:
        """Share of the images on which two models or files predict the same class."""
        return _percent(self.classes[name] == self.classes[other_name])


def classify(data: ClassificationData, split: str, predictors: Mapping[str, Callable[[np.ndarray], Any]]) -> Evaluation:
    """Predicts classes batch by batch, since a split need not fit into memory.

    Args:
      data: Dataset.
      split: Name of the split.
      predictors: {name of a model or file: function from images to logits}.
    """
    labels: list[np.ndarray] = []
    classes: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    with tqdm(total=data.num_examples(split), desc=f"{split} split", unit="image", leave=False) as bar:
        for images, batch_labels in data.evaluation(split).as_numpy_iterator():
            labels.append(batch_labels)
            for name, predict in predictors.items():
                classes[name].append(np.argmax(predict(images), axis=1))
            bar.update(len(images))
    all_classes = {name: np.concatenate(batches) for name, batches in classes.items()}
    return Evaluation(data, split, np.concatenate(labels), all_classes)


def measure_target(
    name: str, target: str, result: targets.Built, evaluation: Evaluation, threads: int
) -> dict[str, Any]:
    """Measures one file on one target.

    Args:
      name: Name of the integer file.
      target: Name of the target.
      result: Result of building the file for the target.
      evaluation: Predictions, those of the integer file in LiteRT included.
      threads: Number of interpreter threads of timed inferences.

    Returns:
      The latency, if LiteRT runs a file of the target; and if the target has an interpreter, its accuracy and its
      agreement with the integer file. JSON-serializable.
    """
    measurements = {} if result.in_litert is None else measure_latency(result.in_litert, threads, _SLOW_RUNS)
    if result.predict is None or result.predict_int8 is None:
        return measurements
    classes, is_equal = [], []
    with tqdm(total=len(evaluation.labels), desc=f"{name}: {target}", unit="image", leave=False) as bar:
        for images, _ in evaluation.data.evaluation(evaluation.split, _TARGET_BATCH).as_numpy_iterator():
            logits = result.predict(images)
            is_equal.append(np.all(logits == result.predict_int8(images), axis=1))
            classes.append(np.argmax(logits, axis=1))
            bar.update(len(images))
    target_classes = np.concatenate(classes)
    return measurements | {
        "top1_percent": _percent(target_classes == evaluation.labels),
        "equal_to_int8_file_on_same_kernels_percent": _percent(np.concatenate(is_equal)),
        "agreement_with_litert_percent": _percent(target_classes == evaluation.classes[name]),
    }


def measure_latency(file: bytes, threads: int, inferences: int) -> dict[str, Any]:
    """Times a file in LiteRT. JSON-serializable."""
    latency = tflite.latency(file, threads, inferences)
    return {
        "latency_ms_p50": round(latency.p50_ms, 4),
        "latency_ms_p90": round(latency.p90_ms, 4),
        "latency_runs": latency.runs,
        "latency_threads": latency.threads,
    }


def _percent(matches):
    return round(100 * float(np.mean(matches)), 3)
