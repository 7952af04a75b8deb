"""Keras callbacks: one progress bar for the whole run, a line of JSON per epoch, averaged weights, and resuming."""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

from tf_repvgg import storage


class Progress(keras.callbacks.Callback):
    """One bar over all steps of the run, with time left and the latest metrics; a context that closes it."""

    def __init__(self, steps_per_epoch, epochs, first_epoch=0, first_step=0):
        super().__init__()
        done = steps_per_epoch * first_epoch + first_step
        self._bar = tqdm(total=steps_per_epoch * epochs, initial=done, unit="step", mininterval=1.0)
        self._epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        self._bar.set_description(f"epoch {epoch + 1}/{self._epochs}")

    def on_train_batch_end(self, batch, logs=None):
        self._bar.update()

    def on_epoch_end(self, epoch, logs=None):
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in (logs or {}).items()})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


class MetricsLog(keras.callbacks.Callback):
    """Appends one JSON object per epoch to a file.

    Lines after the first `epochs_done` are dropped: those of a run that was cut off before its checkpoint. Of the epoch
    that follows them, steps that took `seconds_before` are done already.
    """

    def __init__(self, path, epochs_done=0, seconds_before=0.0):
        super().__init__()
        self._path = path
        self._seconds_before = seconds_before
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:epochs_done]
            with storage.atomic_write(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.monotonic() - self._seconds_before
        self._seconds_before = 0.0

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.monotonic() - self._started
        record = {"epoch": epoch + 1, "seconds": round(seconds, 2)}
        record |= dict(_with_unit(name, value) for name, value in (logs or {}).items())
        storage.append_line(self._path, json.dumps(record))


def _with_unit(name, value):
    return (f"{name}_percent", 100 * value) if name.endswith("top1") else (name, value)


class StopOnNaN(keras.callbacks.Callback):
    """Raises FloatingPointError once the loss or, at an epoch's end, a weight is not finite.

    Stands before all callbacks that write something, so that nothing of the kind is saved or logged.
    """

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss became {logs['loss']} at {_step(self.model)}")

    def on_epoch_end(self, epoch, logs=None):
        # The loss is that of the weights before the last step.
        check_finite(self.model)


def check_finite(model):
    """Raises FloatingPointError if a weight is not finite; names the weight and the step."""
    for variable in model.weights:
        if not np.all(np.isfinite(variable.numpy())):
            raise FloatingPointError(f"{variable.name} holds infinities or NaN at {_step(model)}")


def _step(model):
    return f"step {int(model.optimizer.iterations.numpy())}"


class AverageWeights(keras.callbacks.Callback):
    """Exponential moving average of all weights of a model, which takes their place while it is evaluated.

    After step n: average = d * average + (1 - d) * weight with d = min(decay, (1 + n) / (10 + n)), so that the initial
    weights are soon forgotten (`tf.train.ExponentialMovingAverage`). Running statistics of normalizations are averaged
    like trained weights: those of the weights as they are now do not belong to averaged ones. OABN's limit holds for
    the averages too, as it is applied to the stored gamma whenever that is read.

    Stands before callbacks that write checkpoints, so that these hold the average of the step that they are of.

    Args:
      trainer: compiled model.
      decay: from 0, which averages nothing, to 1.

    Attributes:
      averages: the averaged weights as variables, in the order of the model's own; `Resume` saves them.
    """

    def __init__(self, trainer, decay):
        super().__init__()
        self._weights = trainer.weights
        self._average = tf.train.ExponentialMovingAverage(decay, num_updates=trainer.optimizer.iterations)
        self._average.apply(self._weights)  # makes the variables
        self.averages = [self._average.average(weight) for weight in self._weights]
        # One graph: one by one, these hundreds of small operations would take a part of the step.
        self._update, self._exchange = tf.function(self._update_each), tf.function(self._exchange_each)

    def on_train_batch_end(self, batch, logs=None):
        self._update()

    def on_test_begin(self, logs=None):
        self._exchange()

    def on_test_end(self, logs=None):
        self._exchange()

    def _update_each(self):
        self._average.apply(self._weights)

    def _exchange_each(self):
        for weight, average in zip(self._weights, self.averages, strict=True):
            before = tf.identity(weight.read_value())
            weight.assign(average)
            average.assign(before)


class Resume(keras.callbacks.Callback):
    """Checkpoints weights, optimizer and position in the data, and restores the last checkpoint when made.

    A checkpoint is written after every epoch and, within an epoch, whenever so many minutes have passed since the last.
    It is a folder `ckpt-<step>` that appears whole or not at all; the two latest are kept. It also holds the metrics of
    the epoch so far, so that an epoch which was interrupted is logged like any other.

    Args:
      directory: folder of the checkpoints.
      trainer: compiled model.
      minutes: between checkpoints within an epoch; 0 for none.
      **others: variables, or lists of them, to be saved and restored too.

    Attributes:
      first_epoch: the epoch to continue with, counted from 0.
      first_step: the step in it to continue with, counted from 0.
      seconds_before: what the steps before took, in that epoch.

    Raises:
      ValueError: if the last checkpoint is damaged, or of another network or version.
    """

    def __init__(self, directory, trainer, minutes=0.0, **others):
        super().__init__()
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        storage.remove_partial_files(self._directory)
        self._minutes = minutes
        # Slots must exist before they can be restored.
        trainer.optimizer.build(trainer.trainable_variables)
        self._state = tf.train.Checkpoint(model=trainer, optimizer=trainer.optimizer, **others)
        self.first_epoch, self.first_step, self.seconds_before, self._metrics_before = 0, 0, 0.0, []
        if latest := self.latest:
            try:
                self._state.read(str(latest / "state")).assert_existing_objects_matched()
                position = json.loads((latest / "position.json").read_text(encoding="utf-8"))
                self.first_epoch, self.first_step = position["epoch"], position["step"]
                self.seconds_before, self._metrics_before = position["seconds"], position["metrics"]
            except (tf.errors.OpError, OSError, ValueError, KeyError, AssertionError) as error:
                raise ValueError(
                    f"checkpoint {str(latest)!r} is damaged or of another network ({type(error).__name__}); "
                    f"delete it to continue from the one before, or {directory!r} to start over"
                ) from None
        elif any(self._directory.iterdir()):
            raise ValueError(f"{directory!r} holds no checkpoint that this version reads; delete it to start over")
        self._saved = time.monotonic()

    @property
    def latest(self) -> Path | None:
        """Folder of the last checkpoint; None if there is none."""
        return next(iter(checkpoints(self._directory)), None)

    def on_epoch_begin(self, epoch, logs=None):
        continues = epoch == self.first_epoch
        self._epoch, self._steps_before = epoch, self.first_step if continues else 0
        self._started = time.monotonic() - (self.seconds_before if continues else 0)

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 and self._steps_before:
            # Keras makes the variables of metrics in the first step. They are sums over the steps of the epoch.
            for metric, before in zip(self.model.metrics, self._metrics_before, strict=True):
                metric.set_weights(
                    [now + np.float32(sum_) for now, sum_ in zip(metric.get_weights(), before, strict=True)]
                )
        # What Keras logs for an epoch is computed in its last step, so one step at least must follow the one above.
        due = self._minutes and time.monotonic() - self._saved >= 60 * self._minutes
        if due and batch + 2 < self.params["steps"]:
            check_finite(self.model)
            self._save(
                epoch=self._epoch,
                step=self._steps_before + batch + 1,
                seconds=time.monotonic() - self._started,
                metrics=[[float(sum_) for sum_ in metric.get_weights()] for metric in self.model.metrics],
            )

    def on_epoch_end(self, epoch, logs=None):
        self._save(epoch=epoch + 1, step=0, seconds=0.0, metrics=[])

    def _save(self, **position):
        with storage.atomic_write(self._directory / f"ckpt-{int(self.model.optimizer.iterations.numpy())}") as folder:
            self._state.write(str(folder / "state"))
            (folder / "position.json").write_text(json.dumps(position) + "\n", encoding="utf-8")
        for old in checkpoints(self._directory)[2:]:
            shutil.rmtree(old)
        self._saved = time.monotonic()


def checkpoints(directory) -> list[Path]:
    """Folders of the checkpoints that `Resume` has left in a directory, the latest first."""
    folders = [path for path in Path(directory).glob("ckpt-*") if path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("ckpt-")), reverse=True)
