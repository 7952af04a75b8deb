"""Checkpoints of a run in training, and continuing from them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import storage
from tf_repvgg.training.divergence import check_finite

_KEPT = 2


class Checkpoints(keras.callbacks.Callback):
    """Saves weights, optimizer and position in the data; restores the last checkpoint when constructed.

    A checkpoint is written after every epoch and, within an epoch, whenever `minutes` have passed since the last. It
    is a folder `ckpt-<step>` that appears whole or not at all; the two latest are kept. It also holds the metrics of
    the epoch so far, so that an interrupted epoch is logged like any other.

    Args:
      folder: Folder of the checkpoints; made unless it exists.
      trainer: Compiled model.
      minutes: Minutes between checkpoints within an epoch; 0 for none.
      **others: Further variables, or lists of variables, to save and restore.

    Attributes:
      first_epoch: Number of the epoch to continue with, from 0.
      first_step: Number of the step in that epoch to continue with, from 0.
      seconds_before: Seconds that the run has spent in that epoch before.

    Raises:
      ValueError: If the last checkpoint is damaged, or belongs to another network or version.

    Example:
      >>> import tempfile
      >>> from tf_repvgg.training import checkpoints
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), 10)
      >>> model.compile("sgd")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     first = checkpoints.Checkpoints(folder, model)
      ...     first.set_model(model)
      ...     first.on_epoch_end(0)
      ...     second = checkpoints.Checkpoints(folder, model)
      ...     print(first.first_epoch, second.first_epoch, second.latest.name)
      0 1 ckpt-0
    """

    def __init__(self, folder: str | Path, trainer: keras.Model, minutes: float = 0.0, **others: Any) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        storage.remove_partial_files(self._folder)
        self._minutes = minutes
        # The optimizer's slots must exist before they can be restored.
        trainer.optimizer.build(trainer.trainable_variables)
        self._state = tf.train.Checkpoint(model=trainer, optimizer=trainer.optimizer, **others)
        self.first_epoch, self.first_step, self.seconds_before = 0, 0, 0.0
        self._metrics_before: list[list[float]] = []
        if latest := self.latest:
            self._restore(latest)
        elif any(self._folder.iterdir()):
            raise ValueError(
                f"{str(self._folder)!r} holds no checkpoint that this version reads; delete it to start over"
            )
        self._saved = time.monotonic()

    @property
    def latest(self) -> Path | None:
        """Folder of the last checkpoint; None if there is none."""
        return next(iter(list_checkpoints(self._folder)), None)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the clock, and the count of steps."""
        is_continued = epoch == self.first_epoch
        self._epoch, self._steps_before = epoch, self.first_step if is_continued else 0
        self._started = time.monotonic() - (self.seconds_before if is_continued else 0)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Saves a checkpoint if it is time for one."""
        if batch == 0 and self._steps_before:
            # Keras makes the variables of metrics in the first step. They are sums over the steps of the epoch.
            for metric, sums_before in zip(self.model.metrics, self._metrics_before, strict=True):
                sums = zip(metric.get_weights(), sums_before, strict=True)
                metric.set_weights([value + np.float32(before) for value, before in sums])
        # After the first step of a continued epoch the sums above are added; in the last step Keras computes what it
        # logs for the epoch. So at least two steps must remain.
        is_due = self._minutes and time.monotonic() - self._saved >= 60 * self._minutes
        if is_due and batch + 2 < self.params["steps"]:
            check_finite(self.model)
            self._save(
                epoch=self._epoch,
                step=self._steps_before + batch + 1,
                seconds=time.monotonic() - self._started,
                metrics=[[float(value) for value in metric.get_weights()] for metric in self.model.metrics],
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Saves a checkpoint."""
        self._save(epoch=epoch + 1, step=0, seconds=0.0, metrics=[])

    def _restore(self, checkpoint):
        try:
            self._state.read(str(checkpoint / "state")).assert_existing_objects_matched()
            position = json.loads((checkpoint / "position.json").read_text(encoding="utf-8"))
            self.first_epoch, self.first_step = position["epoch"], position["step"]
            self.seconds_before, self._metrics_before = position["seconds"], position["metrics"]
        except (tf.errors.OpError, OSError, ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} is damaged or of another network ({type(error).__name__}); "
                f"delete it to continue from the one before, or {str(self._folder)!r} to start over"
            ) from None

    def _save(self, **position):
        step = int(self.model.optimizer.iterations.numpy())
        with storage.atomic_write(self._folder / f"ckpt-{step}") as folder:
            self._state.write(str(folder / "state"))
            (folder / "position.json").write_text(json.dumps(position) + "\n", encoding="utf-8")
        for outdated in list_checkpoints(self._folder)[_KEPT:]:
            shutil.rmtree(outdated)
        self._saved = time.monotonic()


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Folders of the checkpoints that `Checkpoints` has written to a folder, the latest first.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg.training import checkpoints
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for step in (9, 10):
      ...         pathlib.Path(folder, f"ckpt-{step}").mkdir()
      ...     print([path.name for path in checkpoints.list_checkpoints(folder)])
      ['ckpt-10', 'ckpt-9']
    """
    folders = [path for path in Path(folder).glob("ckpt-*") if path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("ckpt-")), reverse=True)
