"""Keras callbacks: one progress bar for the whole run, a line of JSON per epoch, and resuming."""

import json
import math
import time

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

from tf_repvgg import runs


class Progress(keras.callbacks.Callback):
    """One bar over all steps of the run, with time left and the latest metrics; a context that closes it."""

    def __init__(self, steps_per_epoch, epochs, first_epoch=0):
        super().__init__()
        self._bar = tqdm(
            total=steps_per_epoch * epochs, initial=steps_per_epoch * first_epoch, unit="step", mininterval=1.0
        )
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

    Lines after the first `epochs_done` are dropped: those of a run that was cut off before its checkpoint.
    """

    def __init__(self, path, epochs_done=0):
        super().__init__()
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:epochs_done]
            with runs.written_whole(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.monotonic() - self._started
        record = {"epoch": epoch + 1, "seconds": round(seconds, 2)}
        record |= dict(_with_unit(name, value) for name, value in (logs or {}).items())
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _with_unit(name, value):
    return (f"{name}_percent", 100 * value) if name.endswith("top1") else (name, value)


class StopOnNaN(keras.callbacks.Callback):
    """Raises FloatingPointError once the loss or, at an epoch's end, a weight is not finite, before it is saved."""

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            self._stop(f"the loss became {logs['loss']}")

    def on_epoch_end(self, epoch, logs=None):
        # The loss is that of the weights before the last step.
        for variable in self.model.weights:
            if not np.all(np.isfinite(variable.numpy())):
                self._stop(f"{variable.name} holds infinities or NaN")

    def _stop(self, what):
        step = int(self.model.optimizer.iterations.numpy())
        raise FloatingPointError(
            f"{what} at step {step}; checkpoints up to the epoch before are kept; "
            "try a lower learning rate in a new workdir"
        )


class Resume(keras.callbacks.Callback):
    """Checkpoints weights, optimizer and epoch after every epoch, and restores the last one when made.

    Attributes:
      first_epoch: the epoch to continue with, counted from 0.

    Raises:
      ValueError: if the last checkpoint is damaged or of another network.
    """

    def __init__(self, directory, trainer):
        super().__init__()
        # Slots must exist before they can be restored.
        trainer.optimizer.build(trainer.trainable_variables)
        self._epochs_done = tf.Variable(0, dtype=tf.int64, trainable=False)
        checkpoint = tf.train.Checkpoint(model=trainer, optimizer=trainer.optimizer, epochs_done=self._epochs_done)
        self._manager = tf.train.CheckpointManager(checkpoint, directory, max_to_keep=2)
        if latest := self._manager.latest_checkpoint:
            try:
                checkpoint.restore(latest).assert_existing_objects_matched()
            except (tf.errors.OpError, ValueError, AssertionError) as error:
                raise ValueError(
                    f"checkpoint {latest!r} is damaged or of another network ({type(error).__name__}); "
                    f"delete {directory!r} to start over"
                ) from None
        self.first_epoch = int(self._epochs_done.numpy())

    def on_epoch_end(self, epoch, logs=None):
        self._epochs_done.assign(epoch + 1)
        self._manager.save(epoch + 1)
