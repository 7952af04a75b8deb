"""Checkpoints of a run in training, and continuing from them."""

import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import tensorflow as tf
import tf_keras as keras
from msgspec import Meta

from tf_repvgg import interruption, json_records, regular_files, storage
from tf_repvgg.training.distribution import Distribution
from tf_repvgg.training.divergence import check_finite

_KEPT = 2
_ALONE = Distribution()
_POSITION_NAME = "position.json"
_Number = Annotated[int, Meta(ge=0, le=2**53)]


class _Position(TypedDict):
    """Content of position.json. Older versions wrote no checksums."""

    epoch: _Number
    step: _Number
    seconds: Annotated[float, Meta(ge=0, le=1e12)]
    metrics: list[list[float]]
    files: NotRequired[dict[str, str]]


class Checkpoints(keras.callbacks.Callback):
    """Saves weights, optimizer and position in the data; restores the last checkpoint when constructed.

    A checkpoint is written after every epoch and, within an epoch, whenever `minutes` have passed since the last, or
    a signal that `tf_repvgg.interruption` has deferred asks the program to end. It is a folder `ckpt-<step>` that
    appears whole or not at all; the two latest are kept. It also holds the metrics of the epoch so far, so that an
    interrupted epoch is logged like any other, and checksums.

    Where several processes train together, a signal to any of them counts for all, and the chief writes. All restore
    the same checkpoint, so they must see the same folder.

    Args:
      folder: Folder of the checkpoints; made unless it exists.
      trainer: Compiled model.
      minutes: Minutes between checkpoints within an epoch; 0 for none.
      distribution: Processes of the training.
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

    def __init__(
        self,
        folder: str | Path,
        trainer: keras.Model,
        minutes: float = 0.0,
        distribution: Distribution = _ALONE,
        **others: Any,
    ) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._distribution = distribution
        if distribution.is_chief:
            self._folder.mkdir(parents=True, exist_ok=True)
            storage.remove_partial_files(self._folder)
        self._minutes = minutes
        # The optimizer's slots must exist before they can be restored.
        trainer.optimizer.build(trainer.trainable_variables)
        self._optimizer = trainer.optimizer
        self._state = tf.train.Checkpoint(model=trainer, optimizer=trainer.optimizer, **others)
        self.first_epoch, self.first_step, self.seconds_before = 0, 0, 0.0
        self._metrics_before: list[list[float]] = []
        if latest := self.latest:
            self._restore(latest)
            self._remove_outdated()  # which a run that was killed after its last checkpoint has left
        elif self._folder.exists() and any(self._folder.iterdir()):
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
        interruption.defer_signals()
        is_due = self._distribution.is_chief and time.monotonic() - self._saved >= 60 * (self._minutes or math.inf)
        is_due, is_ending = self._agree(is_due)
        # After the first step of a continued epoch the sums above are added; in the last step Keras computes what it
        # logs for the epoch. So at least two steps must remain.
        if (is_due or is_ending) and batch + 2 < self.params["steps"]:
            check_finite(self.model)
            self._save(
                epoch=self._epoch,
                step=self._steps_before + batch + 1,
                seconds=time.monotonic() - self._started,
                metrics=[[float(value) for value in metric.get_weights()] for metric in self.model.metrics],
            )
            self._end_if_requested()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Saves a checkpoint."""
        self._save(epoch=epoch + 1, step=0, seconds=0.0, metrics=[])
        self._end_if_requested()

    def _agree(self, is_due=False):
        """Whether a checkpoint is due for any process, and whether a signal asks any of them to end."""
        agreement = self._distribution.agree(is_due=is_due, is_ending=interruption.is_requested())
        return agreement["is_due"], agreement["is_ending"]

    def _end_if_requested(self):
        """After a checkpoint, so that a program that is asked to end loses nothing; the others wait for the chief."""
        _, is_ending = self._agree()
        if is_ending:
            interruption.request_end()
            interruption.raise_received()

    def _restore(self, checkpoint):
        try:
            position = _read_position(checkpoint)
            self._state.read(str(checkpoint / "state")).assert_existing_objects_matched()
            if (step := int(self._optimizer.iterations.numpy())) != _step_of(checkpoint):
                raise ValueError(f"it is of step {step}")
        except Exception as error:  # of many kinds, from TensorFlow's reader of damaged files
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} is damaged or of another network ({_describe(error)}); "
                f"delete it to continue from the one before, or {str(self._folder)!r} to start over"
            ) from None
        self.first_epoch, self.first_step = position["epoch"], position["step"]
        self.seconds_before, self._metrics_before = position["seconds"], position["metrics"]

    def _save(self, **position):
        if not self._distribution.is_chief:
            # Running statistics differ between replicas until they are read, for which all processes are needed.
            with tempfile.TemporaryDirectory() as folder:
                self._state.write(str(Path(folder, "state")))
        else:
            self._write(position)
        self._saved = time.monotonic()

    def _write(self, position):
        step = int(self.model.optimizer.iterations.numpy())
        with storage.atomic_write(self._folder / f"ckpt-{step}") as folder:
            self._state.write(str(folder / "state"))
            files = {path.name: regular_files.hash_file(path) for path in sorted(folder.iterdir())}
            record = json_records.seal({**position, "files": files})
            (folder / _POSITION_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
        self._remove_outdated()

    def _remove_outdated(self):
        if not self._distribution.is_chief:
            return
        for outdated in list_checkpoints(self._folder)[_KEPT:]:
            shutil.rmtree(outdated)


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
    folders = [path for path in Path(folder).glob("ckpt-*") if _step_of(path) is not None and path.is_dir()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(checkpoint):
    """The step in the name of a checkpoint's folder; None for another name."""
    match = re.fullmatch(r"ckpt-(\d{1,18})", checkpoint.name)
    return int(match[1]) if match else None


def _read_position(checkpoint):
    """The position of a checkpoint whose files are as they were written."""
    position = json_records.read(checkpoint / _POSITION_NAME, _Position)
    if "files" in position:
        if not json_records.is_whole(position):
            raise ValueError(f"{_POSITION_NAME} was changed")
        for name, digest in position["files"].items():
            if regular_files.hash_file(checkpoint / name) != digest:
                raise ValueError(f"{name} was changed")
    return position


def _describe(error):
    """The message of one of this package's errors, or the class of one of TensorFlow's, whose messages are long."""
    return str(error) if type(error) in (ValueError, OSError) else type(error).__name__
