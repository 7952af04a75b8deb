"""A page about trained runs and their exports: `write(path, [gather(...), ...])`.

`gather` reads what train/main.py and export/main.py have left, `figures` draws, and `page.html` is the layout.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tf_repvgg import storage
from tf_repvgg.report.gather import check_history, gather
from tf_repvgg.report.records import Run

__all__ = ["Run", "check_history", "check_installed", "gather", "write"]

_REQUIRED_PACKAGES = ("matplotlib", "jinja2")


def check_installed() -> None:
    """Checks that the packages for figures and layout are installed, which tf_repvgg does not require otherwise.

    Raises:
      ValueError: If one is missing. Says how to install it.

    Example:
      >>> from tf_repvgg import report
      >>> report.check_installed() is None  # after pip install 'tf_repvgg[figures]'
      True
    """
    if missing := [name for name in _REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"a report needs {missing[0]}; install it with: pip install 'tf_repvgg[figures]'")


def write(path: str | Path, runs: Sequence[Run]) -> None:
    """Writes one self-contained HTML page about one run, or several side by side.

    Args:
      path: HTML file.
      runs: Runs with at least one integer file each.

    Raises:
      ValueError: As `check_installed`.
      OSError: If the file cannot be written.

    Example:
      >>> import json, pathlib, tempfile
      >>> import numpy as np
      >>> from tf_repvgg import report
      >>> from tf_repvgg.data import ClassificationData
      >>> from tf_repvgg.models import build_repvgg
      >>> folder = pathlib.Path(tempfile.mkdtemp())  # as train/main.py and export/main.py would fill it
      >>> build_repvgg("digits", (8, 8, 1), num_classes=10).save(folder / "model.keras")
      >>> np.savez(folder / "predictions.npz", **{"labels": [3], "float_fused": [3], "int4.tflite": [3]})
      >>> layer = {"layer": "stem", "weights": 144, "weight_bits": 4, "codes_used": 15, "entropy_bits": 3.5,
      ...          "weight_sqnr_db": 20.0, "activation_sqnr_db": 19.0, "codebook": None}
      >>> file = {"file": "int4.tflite", "weights": "as trained", "top1_percent": 100.0, "file_bytes": 9000,
      ...         "latency_ms_p50": 0.1, "latency_ms_p90": 0.2, "latency_threads": 1, "layers": [layer], "targets": {}}
      >>> export = {"files": [file], "outliers": [{"name": "stem", "outlier_ratio": 9.0}],
      ...           "evaluation_dataset": "digits", "evaluation_split": "test", "input": {"dataset": "digits"},
      ...           "flags": {"activation_bits": 8}, "machine": {"cpu": "a CPU", "cores": 2}}
      >>> length = (folder / "export.json").write_text(json.dumps(export))
      >>> run = report.gather("", folder, [folder], ClassificationData("digits"))
      >>> report.write(folder / "report.html", [run])
      >>> (folder / "report.html").read_text()[:15]
      '<!doctype html>'
    """
    check_installed()
    from tf_repvgg.report import page  # imports those packages

    storage.write_bytes(path, page.render(runs).encode())
