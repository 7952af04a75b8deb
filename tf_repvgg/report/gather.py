"""What a report is about, read from a run's folder and its exports; no drawing here."""

import base64
import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import tf_keras as keras
from PIL import Image

from tf_repvgg import graph, runs
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, kernel_of

_FLOAT_FORMS = ("float_fused", "trained_model")
_SHOWN_BLOCKS = 4
_SHOWN_IMAGES = 12
_BINS = 81
# An integer file is held to be good if it loses no more than this.
_TOLERATED_POINTS = 2.0


@dataclasses.dataclass(frozen=True)
class File:
    """One integer file of an export.

    Attributes:
      run: title of the run.
      name: of the file.
      bits: of its weights; those that most of them have, where layers differ.
      granularity: "per tensor" or "per channel"; empty where training has decided.
      method: of post-training quantization, or "as trained".
      top1: in percent.
      packed_bytes: the file's, were every weight stored in the bits that tell its layer's codes apart.
      record: its entry in export.json.
    """

    run: str
    name: str
    bits: int
    granularity: str
    method: str
    top1: float
    packed_bytes: int
    record: dict

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [f"{self.bits} bit", self.granularity, self.method]))

    @property
    def series(self) -> str:
        """What it has in common with files of other widths."""
        return ", ".join(filter(None, [self.run, self.granularity, self.method]))


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Weights of one layer in standard deviations of its merged kernel.

    Attributes:
      layer: name.
      edges: [bins + 1].
      merged: counts of the merged kernel, [bins].
      branches: counts of what each training branch adds to it, zeros of the placing left out.
      largest: largest magnitude of the merged kernel.
      codebook: the distinct weights of a file with few, else None.
    """

    layer: str
    edges: np.ndarray
    merged: np.ndarray
    branches: dict[str, np.ndarray]
    largest: float
    codebook: list[float] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run and what was exported of it.

    Attributes:
      title: empty for a run that stands alone.
      settings: {flag: value} of config.flags.
      result: result.json, empty without.
      epochs: lines of metrics.jsonl.
      exports: export.json of each export; the first is what is said of the float model.
      files: all of them.
      histograms: of a few layers.
      codebook_of: the file whose codebook is drawn into them, if any.
      labels: names of the classes.
      truth: class of each image.
      reference: class that the model finds before it becomes a file.
      found: {file name: class that it finds}.
      pictures: indices -> images as data URIs.
    """

    title: str
    settings: dict[str, str]
    result: dict
    epochs: list[dict]
    exports: list[dict]
    files: list[File]
    histograms: list[Histogram]
    codebook_of: File | None
    labels: list[str]
    truth: np.ndarray
    reference: np.ndarray
    found: dict[str, np.ndarray]
    pictures: "Pictures"

    @property
    def reference_top1(self) -> float:
        return round(100 * float(np.mean(self.reference == self.truth)), 3)

    def file(self, name) -> File:
        return next(file for file in self.files if file.name == name)

    def confusion(self, name) -> np.ndarray:
        """Counts [true class, class that a file finds]."""
        counts = np.zeros([len(self.labels)] * 2, int)
        np.add.at(counts, (self.truth, self.found[name]), 1)
        return counts

    def changed(self, name) -> dict[str, np.ndarray]:
        """Indices of images that a file sees otherwise than the model before: lost, won, or wrong both times."""
        found = self.found[name]
        differs, was_right, is_right = found != self.reference, self.reference == self.truth, found == self.truth
        kinds = {
            "lost": differs & was_right,
            "won": differs & is_right,
            "wrong both times": differs & ~was_right & ~is_right,
        }
        return {kind: np.flatnonzero(those) for kind, those in kinds.items()}

    def changed_images(self, name) -> list[dict]:
        """Some of them, the lost ones first, as {picture, truth, before, after, kind}."""
        chosen = [(int(i), kind) for kind, indices in self.changed(name).items() for i in indices][:_SHOWN_IMAGES]
        pictures = self.pictures([index for index, _ in chosen])
        return [
            {
                "picture": pictures[index],
                "kind": kind,
                "truth": self.labels[self.truth[index]],
                "before": self.labels[self.reference[index]],
                "after": self.labels[self.found[name][index]],
            }
            for index, kind in chosen
        ]


class Pictures:
    """Images of a split of a `ClassificationData` by index."""

    def __init__(self, data, split):
        self._images, self._data = data.images(split), data

    def __call__(self, indices) -> dict[int, str]:
        """{index: data URI of a PNG}."""
        wanted, found = set(indices), {}
        for index, (image, _) in enumerate(self._images.as_numpy_iterator()):
            if len(found) == len(wanted):
                break
            if index in wanted:
                found[index] = _data_uri(image)
        return found


def _data_uri(image):
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def gather(title: str, workdir, exports, data) -> Run:
    """Reads a run of train/main.py, or a model file in it, and the folders that export/main.py wrote of it.

    Args:
      title: of the run, among others.
      workdir: folder or .keras file.
      exports: folders, each with its export.json and predictions.npz, all of one evaluation split.
      data: the `ClassificationData` they were evaluated on.

    Raises:
      FileNotFoundError: without a model, or its exports.
    """
    folder, exports = runs.folder_of(workdir), [Path(export) for export in exports]
    records = [json.loads((export / "export.json").read_text(encoding="utf-8")) for export in exports]
    classes = {}
    for export in exports:
        with np.load(export / "predictions.npz") as found:
            classes |= dict(found)
    files = [_file(title, entry) for record in records for entry in record["files"]]
    clustered = [file for file in files if any(layer["codebook"] for layer in file.record["layers"])]
    reference = classes[next(form for form in _FLOAT_FORMS if form in classes)]
    reference_top1 = 100 * float(np.mean(reference == classes["labels"]))
    codebook_of = _smallest_good([(file, file.top1 - reference_top1) for file in clustered]) if clustered else None
    return Run(
        title=title,
        settings=_settings(folder / runs.CONFIG_NAME),
        result=_json_if_there(folder / "result.json"),
        epochs=_epochs(folder / "metrics.jsonl"),
        exports=records,
        files=files,
        histograms=_histograms(runs.load_model(workdir), codebook_of),
        codebook_of=codebook_of,
        labels=[str(label) for label in data.labels],
        truth=classes["labels"],
        reference=reference,
        found={file.name: classes[file.name] for file in files},
        pictures=Pictures(data, records[0]["evaluation_split"]),
    )


def featured(gathered: list[Run]) -> str:
    """The name of the file that a page shows in detail, of every run that has it.

    That of the fewest bytes, packed, which loses no more than 2 points in one of the runs; the most accurate if all do.
    """
    return _smallest_good([(file, file.top1 - run.reference_top1) for run in gathered for file in run.files]).name


def _smallest_good(files):
    """The file among (file, its points above the model before) that is the smallest and good, or the most accurate."""
    good = [file for file, difference in files if difference >= -_TOLERATED_POINTS]
    if good:
        return min(good, key=lambda file: (file.packed_bytes, -file.top1))
    return max((file for file, _ in files), key=lambda file: file.top1)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (bytes, accuracy) that no other beats in both, by bytes."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _file(run, entry):
    layers = entry["layers"]
    count = Counter()
    for layer in layers:
        count[layer["weight_bits"]] += layer["weights"]
    weights = sum(layer["weights"] for layer in layers)
    packed = sum(-(-layer["weights"] * layer["weight_bits"] // 8) for layer in layers)
    return File(
        run=run,
        name=entry["file"],
        bits=entry.get("weight_bits") or count.most_common(1)[0][0],
        granularity=entry.get("granularity", "").replace("_", " "),
        method=entry.get("ptq") or entry["weights"],
        top1=entry["top1_percent"],
        packed_bytes=entry["file_bytes"] - weights + packed,
        record=entry,
    )


def _settings(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = (line.lstrip("-").partition("=") for line in lines)
    return {name: value if equals else "yes" for name, equals, value in pairs}


def _json_if_there(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _epochs(path):
    """The last entry of each epoch: one that an interruption cut short is there twice."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({entry["epoch"]: entry for entry in map(json.loads, lines)}.values())


def _histograms(model: keras.Model, codebook_of):
    """Of a few layers evenly from first to last: blocks that may have an identity branch, where there are any."""
    blocks = graph.find_layers(model, ReparameterizedBlock)
    # Also those of runs without the branch: other runs of the architecture have it in the same layers.
    keep_channels = [block for block in blocks if block.conv3x3.kernel.shape[2] * block.groups == block.filters]
    layers = keep_channels or blocks or graph.find_layers(model, WEIGHTED_LAYERS)
    picks = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _SHOWN_BLOCKS)).round().astype(int))
    codebooks = {each["layer"]: each["codebook"] for each in codebook_of.record["layers"]} if codebook_of else {}
    return [_histogram(layers[pick], codebooks.get(layers[pick].name)) for pick in picks]


def _histogram(layer, codebook):
    if isinstance(layer, ReparameterizedBlock):
        merged = layer.equivalent_kernel_and_bias()[0].numpy()
        branches = {name: kernel.numpy() for name, (kernel, _) in layer.branches().items()}
    else:
        merged, branches = kernel_of(layer), {}
    std = float(np.std(merged)) or 1.0
    largest = max(float(np.max(np.abs(kernel))) for kernel in (merged, *branches.values())) / std
    edges = np.linspace(-largest, largest, _BINS + 1)
    return Histogram(
        layer=layer.name,
        edges=edges,
        merged=np.histogram(merged / std, edges)[0],
        branches={name: np.histogram(kernel[kernel != 0] / std, edges)[0] for name, kernel in branches.items()},
        largest=float(np.max(np.abs(merged))) / std,
        codebook=codebook and [weight / std for weight in codebook],
    )
