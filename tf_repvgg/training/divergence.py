"""Stopping a training whose loss or weights are no longer finite."""

import math

import numpy as np
import tf_keras as keras


class StopOnNaN(keras.callbacks.Callback):
    """Raises FloatingPointError when the loss or, at the end of an epoch, a weight is not finite.

    It goes before all callbacks that write files, so that no such loss is logged and no such weights are saved.

    Example:
      >>> from tf_repvgg.training import divergence
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), 10)
      >>> model.compile("sgd")
      >>> stop = divergence.StopOnNaN()
      >>> stop.set_model(model)
      >>> stop.on_train_batch_end(0, {"loss": float("inf")})
      Traceback (most recent call last):
      FloatingPointError: the loss became inf at step 0
    """

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Checks the loss.

        Raises:
          FloatingPointError: If it is not finite; names the step.
        """
        if logs is not None and not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss became {logs['loss']} at {_describe_step(self.model)}")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Checks the weights: the last step has changed them since the loss was computed.

        Raises:
          FloatingPointError: If one is not finite; names it.
        """
        check_finite(self.model)


def check_finite(model: keras.Model) -> None:
    """Checks all weights of a compiled model.

    Raises:
      FloatingPointError: If a weight is not finite; names the weight and the step.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.training import divergence
      >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
      >>> model.compile("sgd")
      >>> model.layers[0].bias.assign([float("nan")]) is not None
      True
      >>> divergence.check_finite(model)
      Traceback (most recent call last):
      FloatingPointError: dense/bias:0 holds infinities or NaN at step 0
    """
    for variable in model.weights:
        if not np.all(np.isfinite(variable.numpy())):
            raise FloatingPointError(f"{variable.name} holds infinities or NaN at {_describe_step(model)}")


def _describe_step(model):
    return f"step {int(model.optimizer.iterations.numpy())}"
