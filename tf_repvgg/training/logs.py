"""How training is reported: a progress bar for the whole run, and a line of JSON per epoch."""

import json
import time
from pathlib import Path
from typing import Any, Self

import tf_keras as keras
from tqdm import tqdm

from tf_repvgg import regular_files, runs, storage


class ProgressBar(keras.callbacks.Callback):
    """One bar over all steps of a run, with the time left and the latest metrics; a context manager that closes it.

    Args:
      steps_per_epoch: Number of steps in each epoch.
      epochs: Number of epochs of the whole run.
      first_epoch: Number of the epoch at which training starts, from 0.
      first_step: Number of the step in that epoch at which training starts, from 0.

    Example:
      >>> from tf_repvgg.training import logs
      >>> with logs.ProgressBar(steps_per_epoch=5, epochs=2) as bar:
      ...     bar.on_epoch_begin(0)
      ...     bar.on_train_batch_end(0)
    """

    def __init__(self, steps_per_epoch: int, epochs: int, first_epoch: int = 0, first_step: int = 0) -> None:
        super().__init__()
        steps_done = steps_per_epoch * first_epoch + first_step
        self._bar = tqdm(total=steps_per_epoch * epochs, initial=steps_done, unit="step", mininterval=1.0)
        self._epochs = epochs

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Shows the number of the epoch."""
        self._bar.set_description(f"epoch {epoch + 1}/{self._epochs}")

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Moves the bar by one step."""
        self._bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Shows the metrics of the epoch."""
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in (logs or {}).items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()


class MetricsLog(keras.callbacks.Callback):
    """Appends one JSON object per epoch to a file.

    Lines after the first `epochs_done` are dropped: they come from a run that was interrupted before the checkpoint of
    their epoch was complete.

    Args:
      path: File to append to.
      epochs_done: Number of epochs that a continued run has finished before.
      seconds_before: Seconds that the run has spent in the epoch after those before it was interrupted.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If a line that is kept is damaged; names it.

    Example:
      >>> import json, pathlib, tempfile
      >>> from tf_repvgg.training import logs
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "metrics.jsonl")
      ...     log = logs.MetricsLog(path)
      ...     log.on_epoch_begin(0)
      ...     log.on_epoch_end(0, {"top1": 0.5})
      ...     record = json.loads(path.read_text())
      >>> record["epoch"], record["top1_percent"]
      (1, 50.0)
    """

    def __init__(self, path: Path, epochs_done: int = 0, seconds_before: float = 0.0) -> None:
        super().__init__()
        self._path = path
        self._seconds_before = seconds_before
        if path.exists():
            runs.read_epochs(path, epochs_done)  # refuses damaged lines now rather than after the training
            lines = regular_files.read_text(path).splitlines(keepends=True)[:epochs_done]
            with storage.atomic_write(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        self._started = time.monotonic() - self._seconds_before
        self._seconds_before = 0.0

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Appends the line of the epoch."""
        seconds = time.monotonic() - self._started
        record = {"epoch": epoch + 1, "seconds": round(seconds, 2)}
        record |= dict(_add_unit(name, value) for name, value in (logs or {}).items())
        storage.append_line(self._path, json.dumps(record))


def _add_unit(name, value):
    return (f"{name}_percent", 100 * value) if name.endswith("top1") else (name, value)
