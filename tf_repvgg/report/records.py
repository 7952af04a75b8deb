"""The contents of a report: a run, its files, and comparisons between them. Nothing is read or drawn here."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_SHOWN_IMAGES = 12
# An integer file counts as good if it loses no more accuracy than this, in percentage points.
_TOLERATED_POINTS = 2.0

# Kinds of changed predictions, in the order in which examples are shown: how a page calls them.
CHANGES = {"lost": "no longer correct", "won": "newly correct", "wrong": "wrong before and after"}


@dataclasses.dataclass(frozen=True)
class File:
    """One integer file of an export.

    Attributes:
      run: Title of the run.
      name: Name of the file.
      bits: Bits per weight; where layers differ, those of most weights.
      granularity: "per tensor" or "per channel"; empty if training has decided it.
      method: Method of post-training quantization, or "as trained".
      top1: Top-1 accuracy in percent.
      packed_bytes: Bytes that the file would have if every weight took only as many bits as distinguish the codes of
        its layer.
      record: The file's entry in export.json.
    """

    run: str
    name: str
    bits: int
    granularity: str
    method: str
    top1: float
    packed_bytes: int
    record: dict[str, Any]

    @property
    def label(self) -> str:
        """Bits, granularity and method, in words."""
        return _join(f"{self.bits} bit", self.granularity, self.method)

    @property
    def full_label(self) -> str:
        """The label after the title of the run."""
        return _join(self.run, self.label)

    @property
    def series(self) -> str:
        """What the file has in common with files of other bit widths, in words."""
        return _join(self.run, self.granularity, self.method)


def _join(*parts):
    return ", ".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Histogram of one layer's weights, in standard deviations of its merged kernel.

    Attributes:
      layer: Name of the layer.
      edges: Edges of the bins: [bins + 1].
      merged: Counts of the merged kernel: [bins].
      branches: Counts of the part of each training branch in the merged kernel, without the zeros around a 1x1 kernel.
      largest: Largest magnitude of the merged kernel.
      codebook: Distinct weights of a clustered file, else None.
    """

    layer: str
    edges: np.ndarray
    merged: np.ndarray
    branches: dict[str, np.ndarray]
    largest: float
    codebook: list[float] | None


@dataclasses.dataclass(frozen=True)
class ExtremeImage:
    """A calibration image on which layers of the float model reach farther than on the others.

    Attributes:
      number: Place of the image in its split.
      picture: Data URI.
      factors: (layer, how many times as far as on the median image it reaches), the largest first.
    """

    number: int
    picture: str
    factors: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run and its exports.

    Attributes:
      title: Title among other runs; empty for a run that stands alone.
      settings: {flag: value} of config.flags.
      result: Content of result.json; empty without that file.
      epochs: Lines of metrics.jsonl.
      exports: export.json of each export; the report takes data on the float model from the first.
      files: Integer files of all exports.
      histograms: Histograms of a few layers.
      codebook_of: The file whose codebook the histograms show, if any.
      labels: Names of the classes.
      truth: Class of each image: integers [images].
      reference: Class that the float model predicts for each image: integers [images].
      predictions: {file name: class that the file predicts for each image}.
      pictures: Function from indices of images to {index: data URI}.
      extreme_images: Calibration images with the largest activations, if the export has looked for them.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.report import Run
      >>> classes = {"truth": np.array([0, 1, 1]), "reference": np.array([0, 1, 0])}
      >>> contents = {"settings": {}, "result": {}, "epochs": [], "exports": [], "files": [], "histograms": []}
      >>> run = Run(title="", labels=["cat", "dog"], **classes, **contents, codebook_of=None,
      ...           predictions={"int4.tflite": np.array([0, 0, 1])}, pictures=lambda indices: {})
      >>> run.confusion("int4.tflite").tolist()
      [[1, 0], [1, 1]]
    """

    title: str
    settings: dict[str, str]
    result: dict[str, Any]
    epochs: list[dict[str, Any]]
    exports: list[dict[str, Any]]
    files: list[File]
    histograms: list[Histogram]
    codebook_of: File | None
    labels: list[str]
    truth: np.ndarray
    reference: np.ndarray
    predictions: dict[str, np.ndarray]
    pictures: Callable[[Iterable[int]], dict[int, str]]
    extreme_images: list[ExtremeImage] = dataclasses.field(default_factory=list)

    @property
    def reference_top1(self) -> float:
        """Top-1 accuracy of the float model in percent."""
        return round(100 * float(np.mean(self.reference == self.truth)), 3)

    def find_file(self, name: str) -> File:
        """The file of a name."""
        return next(file for file in self.files if file.name == name)

    def confusion(self, name: str) -> np.ndarray:
        """Number of images by true class and class that a file predicts: integers [classes, classes]."""
        counts = np.zeros([len(self.labels)] * 2, int)
        np.add.at(counts, (self.truth, self.predictions[name]), 1)
        return counts

    def changes(self, name: str) -> dict[str, np.ndarray]:
        """Indices of the images for which a file predicts another class than the float model, by key of `CHANGES`."""
        prediction = self.predictions[name]
        differs, was_right, is_right = (
            prediction != self.reference,
            self.reference == self.truth,
            prediction == self.truth,
        )
        masks = {"lost": differs & was_right, "won": differs & is_right, "wrong": differs & ~was_right & ~is_right}
        return {change: np.flatnonzero(masks[change]) for change in CHANGES}

    def pick_examples(self, name: str) -> list[dict[str, str]]:
        """Some of the images with another prediction, as {picture, truth, before, after, change}."""
        chosen = [(int(i), change) for change, indices in self.changes(name).items() for i in indices][:_SHOWN_IMAGES]
        pictures = self.pictures([index for index, _ in chosen])
        return [
            {
                "picture": pictures[index],
                "change": change,
                "truth": self.labels[self.truth[index]],
                "before": self.labels[self.reference[index]],
                "after": self.labels[self.predictions[name][index]],
            }
            for index, change in chosen
        ]


def choose_featured(runs: Sequence[Run]) -> str:
    """Chooses the file that a page shows in detail, for every run that has it.

    Of the files that lose at most 2 points in one of the runs, it is the one with the fewest bytes, packed; if all lose
    more, the most accurate one.

    Returns:
      Name of the file.
    """
    return choose_smallest_good([(file, file.top1 - run.reference_top1) for run in runs for file in run.files]).name


def choose_smallest_good(files: Sequence[tuple[File, float]]) -> File:
    """Of pairs (file, points above the float model), the smallest good file; the most accurate if none is good."""
    good = [file for file, difference in files if difference >= -_TOLERATED_POINTS]
    if good:
        return min(good, key=lambda file: (file.packed_bytes, -file.top1))
    return max((file for file, _ in files), key=lambda file: file.top1)


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (bytes, accuracy) to which no other is superior in both, in order of bytes."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
