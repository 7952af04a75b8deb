"""One cell of the tables of experiments/fit.py: a model, its levels chosen in one way, and its test accuracy."""

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np
import tf_keras as keras

from harness.fit.references import fit_greedily, keep_ends_whole
from harness.low_bit.fine_tunings import Result
from harness.ptq.cells import Settings, hash_model, load_data, load_fused
from tf_repvgg import tflite
from tf_repvgg.quantization.fitting import Budget, Fitted, Fitter, Level
from tf_repvgg.storage import FinishedWork

# Ways to choose levels, in the order of the table: {key: heading}.
WAYS = {
    "uniform": "uniform",
    "ends": "8 bits at the ends",
    "greedy": "greedy",
    "exact": "exact choice",
    "fitted": "fitted",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model, and how the levels of its layers are chosen.

    Attributes:
      model: Name of the model.
      workdir: Workdir of the trained model.
      target: Name of the target.
      method: Method of post-training quantization.
      clusters: Number of clusters of the uniform choice whose cost is the budget.
      way: Key of `WAYS`.
      field: Field of `Budget` that is the budget.
    """

    model: str
    workdir: str
    target: str
    method: str
    clusters: int
    way: str
    field: str = "file_bytes"

    @property
    def name(self) -> str:
        """Name of the cell."""
        return f"{self.model}/{self.target}_{self.method}_{self.clusters}_{self.way}_{self.field}"

    def find_inputs(self, settings: Settings) -> dict:
        """Everything that the result depends on, except the program itself."""
        return {
            "model_sha256": hash_model(self.workdir),
            **{key: getattr(self, key) for key in ("model", "target", "method", "clusters", "way", "field")},
            "calibration_images": settings.calibration_images,
            "test_images": settings.test_images,
            "iterations": settings.iterations if self.method == "codebook_adaquant" else None,
        }


def measure(cell: Cell, settings: Settings, budget: float | None, folder: Path) -> dict:
    """Chooses the levels of a cell, writes the file and runs it over the test split.

    Args:
      cell: Cell.
      settings: Settings that all cells share.
      budget: Cost of the uniform choice, in the unit of the cell's field; None for the uniform choice itself.
      folder: Folder in which damages of layers are kept; a subfolder for each model and target.
    """
    data, started = load_data(cell.workdir, settings), time.monotonic()
    fitter = load_fitter(cell.workdir, cell.target, cell.method, settings, folder)
    loaded = time.monotonic()
    fitted = _choose(cell, fitter, budget)
    seconds = time.monotonic() - loaded
    classes = np.argmax(tflite.predict(fitted.file, data.images), axis=1)
    keras.backend.clear_session()
    return {
        **Result(classes == data.labels).as_record(),
        "measured": fitted.assignment.measured,
        "levels": {layer.name: str(layer.level) for layer in fitted.assignment.layers},
        "error": fitter.measure_error(fitted.assignment.levels),
        "search": fitted.record,
        "seconds": round(seconds, 1),
        "seconds_for_damages": round(loaded - started, 1),
    }


def _choose(cell, fitter: Fitter, budget: float | None) -> Fitted:
    uniform = dict.fromkeys(fitter.costs, Level(cell.clusters, per_channel=False))
    match cell.way:
        case "uniform":
            return fitter.build(uniform)
        case "ends":
            return fitter.build(keep_ends_whole(uniform))
        case "greedy":
            return fitter.build(fit_greedily(fitter, int(budget or 0)))
    evaluations = fitter.evaluations
    fitter.evaluations = 0 if cell.way == "exact" else evaluations
    try:
        return fitter.fit(Budget(**{cell.field: budget}))
    finally:
        fitter.evaluations = evaluations


@functools.lru_cache(1)
def load_fitter(workdir: str, target: str, method: str, settings: Settings, folder: Path | None) -> Fitter:
    """A fitter of a model, with the damages of all levels.

    Args:
      workdir: Workdir of the trained model.
      target: Name of the target.
      method: Method of post-training quantization.
      settings: Settings that all cells share.
      folder: Folder in which damages of layers are kept; None measures them.
    """
    data = load_data(workdir, settings)
    return Fitter(
        load_fused(workdir),
        target,
        data.calibration,
        method,
        finished_work=folder and FinishedWork(folder / f"{Path(workdir).name}_{target}"),
        iterations=settings.iterations,
        input_range=data.input_range,
    )


def compare_with_sums(fitter: Fitter, count: int) -> dict:
    """The sums of damages of random assignments beside their measured errors.

    Args:
      fitter: Fitter of a model.
      count: Number of assignments, each of a random range of levels.
    """
    from scipy.stats import spearmanr

    generator, sums, errors = np.random.default_rng(0), [], []
    for _ in range(count):
        lowest = generator.uniform(0, 0.7)
        levels = {}
        for name, damages in fitter.damages.items():
            choices = sorted(damages, key=lambda level: fitter.costs[name][level][0])
            levels[name] = choices[int(len(choices) * generator.uniform(lowest, 1))]
        sums.append(fitter.sum_damages(levels))
        errors.append(fitter.measure_error(levels))
    return {"assignments": count, "sums": sums, "errors": errors, "rank_correlation": float(spearmanr(sums, errors)[0])}
