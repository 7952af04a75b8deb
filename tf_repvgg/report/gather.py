"""Reads what train/main.py and export/main.py have left of a run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tf_repvgg import json_records, regular_files, runs
from tf_repvgg.data import ClassificationData
from tf_repvgg.report.histograms import make_histograms
from tf_repvgg.report.records import ExtremeImage, File, Run, choose_smallest_good

_FLOAT_FORMS = ("float_fused", "trained_model")
_LARGEST_PREDICTIONS = 2**30
_LAYERS_OF_EXTREME_IMAGE = 4


class _ExportRecord(TypedDict):
    """The parts of export.json that every report needs."""

    files: list[dict[str, Any]]
    evaluation_split: str


def check_history(workdir: str | Path) -> None:
    """Checks that a report can read what train/main.py has written to a run, before the export takes its time.

    Args:
      workdir: Folder of a run, or a model file.

    Raises:
      OSError: If a file cannot be read.
      ValueError: If a file is damaged; names it.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import report
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     length = pathlib.Path(folder, "result.json").write_text('{"images": "many"}')
      ...     try:
      ...         report.check_history(folder)
      ...     except ValueError as error:
      ...         print(str(error).partition("result.json")[2])
      : images is 'many', but `int` is expected
    """
    folder = runs.folder_of(workdir)
    _read_settings(folder / runs.CONFIG_NAME)
    runs.read_result(folder / runs.RESULT_NAME)
    runs.read_epochs(folder / runs.METRICS_NAME)


def gather(
    title: str,
    workdir: str | Path,
    exports: Sequence[str | Path],
    data: ClassificationData,
    trust_model: bool = False,
) -> Run:
    """Reads a run of train/main.py, or a model file in it, and the folders that export/main.py wrote of it.

    Args:
      title: Title among other runs; empty for a run that stands alone.
      workdir: Folder or .keras file.
      exports: Folders, each with its export.json and predictions.npz, all for one evaluation split.
      data: Dataset that the files were evaluated on.
      trust_model: Whether the model file may run code; see `runs.load_model`.

    Raises:
      OSError: If the model or an export is missing, or a file cannot be read.
      ValueError: If a file is damaged; names it.

    Example:
      >>> import json, pathlib, tempfile
      >>> import numpy as np
      >>> from tf_repvgg import report
      >>> from tf_repvgg.data import ClassificationData
      >>> from tf_repvgg.models import build_repvgg
      >>> folder = pathlib.Path(tempfile.mkdtemp())  # as train/main.py and export/main.py would fill it
      >>> build_repvgg("digits", (8, 8, 1), num_classes=10).save(folder / "model.keras")
      >>> np.savez(folder / "predictions.npz", labels=[3, 5], float_fused=[3, 1])
      >>> export = {"files": [], "evaluation_split": "test"}
      >>> length = (folder / "export.json").write_text(json.dumps(export))
      >>> run = report.gather("example", folder, [folder], ClassificationData("digits"))
      >>> run.reference_top1, len(run.histograms)
      (50.0, 4)
    """
    folder = runs.folder_of(workdir)
    records = [json_records.read(Path(export, "export.json"), _ExportRecord) for export in exports]
    classes: dict[str, np.ndarray] = {}
    for export in exports:
        with (
            regular_files.open_to_read(Path(export, "predictions.npz"), _LARGEST_PREDICTIONS) as file,
            np.load(file) as predictions,
        ):
            classes |= dict(predictions)
    files = [_make_file(title, entry) for record in records for entry in record["files"]]
    clustered = [file for file in files if any(layer["codebook"] for layer in file.record["layers"])]
    reference = classes[next(form for form in _FLOAT_FORMS if form in classes)]
    reference_top1 = 100 * float(np.mean(reference == classes["labels"]))
    differences = [(file, file.top1 - reference_top1) for file in clustered]
    codebook_of = choose_smallest_good(differences) if differences else None
    codebooks = {layer["layer"]: layer["codebook"] for layer in codebook_of.record["layers"]} if codebook_of else {}

    def read_pictures(indices, split=records[0]["evaluation_split"]):
        from tf_repvgg.report import pictures  # imports Pillow

        return pictures.read_pictures(data, split, indices)

    return Run(
        title=title,
        settings=_read_settings(folder / runs.CONFIG_NAME),
        result=runs.read_result(folder / runs.RESULT_NAME),
        epochs=_read_epochs(folder / runs.METRICS_NAME),
        exports=records,
        files=files,
        histograms=make_histograms(runs.load_model(workdir, trust_model), codebooks),
        codebook_of=codebook_of,
        labels=[str(label) for label in data.labels],
        truth=classes["labels"],
        reference=reference,
        predictions={file.name: classes[file.name] for file in files},
        pictures=read_pictures,
        extreme_images=_list_extreme_images(records[0], read_pictures),
    )


def _make_file(run, entry):
    layers = entry["layers"]
    weights_by_bits: Counter[int] = Counter()
    for layer in layers:
        weights_by_bits[layer["weight_bits"]] += layer["weights"]
    packed = sum(-(-layer["weights"] * layer["weight_bits"] // 8) for layer in layers)
    return File(
        run=run,
        name=entry["file"],
        bits=entry.get("weight_bits") or weights_by_bits.most_common(1)[0][0],
        granularity=entry.get("granularity", "").replace("_", " "),
        method=entry.get("ptq") or entry["weights"],
        top1=entry["top1_percent"],
        packed_bytes=entry["file_bytes"] - weights_by_bits.total() + packed,
        record=entry,
    )


def _list_extreme_images(record, read_pictures):
    """Pictures of the images that the export has found to have extreme activations, with a few layers."""
    images = record.get("extreme_images", [])
    if not images:
        return []
    pictures = read_pictures([entry["image"] for entry in images], record["flags"]["calibration_split"])
    return [
        ExtremeImage(
            number=entry["image"],
            picture=pictures[entry["image"]],
            factors=sorted(entry["factors"].items(), key=lambda layer: -layer[1])[:_LAYERS_OF_EXTREME_IMAGE],
        )
        for entry in images
    ]


def _read_settings(path):
    lines = regular_files.read_text(path).splitlines() if path.exists() else []
    pairs = (line.lstrip("-").partition("=") for line in lines)
    return {name: value if equals else "yes" for name, equals, value in pairs}


def _read_epochs(path):
    """The last entry of each epoch: an epoch that was interrupted and repeated has two."""
    return list({entry["epoch"]: entry for entry in runs.read_epochs(path)}.values())
