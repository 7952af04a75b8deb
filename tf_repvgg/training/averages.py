"""Moving average of the weights of a model in training."""

import tensorflow as tf
import tf_keras as keras


class MovingAverage(keras.callbacks.Callback):
    """Exponential moving average of all weights of a model, which replaces the weights while the model is evaluated.

    After step n: average = d * average + (1 - d) * weight with d = min(decay, (1 + n) / (10 + n)), so that the initial
    weights are soon forgotten (`tf.train.ExponentialMovingAverage`). Running statistics of normalizations are averaged
    like trained weights: the statistics of the current weights do not fit averaged weights. OABN's limit holds for the
    averages too, since it is applied to the stored gamma whenever that is read.

    It goes before callbacks that write checkpoints, so that a checkpoint holds the averages of its own step.

    Args:
      trainer: Compiled model.
      decay: Decay d, from 0, which averages nothing, to 1.

    Attributes:
      averages: Averaged weights as variables, in the order of the model's weights.

    Example:
      >>> from tf_repvgg.training import averages
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), 10)
      >>> model.compile("sgd")
      >>> average = averages.MovingAverage(model, decay=0.999)
      >>> len(average.averages) == len(model.weights)
      True
    """

    def __init__(self, trainer: keras.Model, decay: float) -> None:
        super().__init__()
        self._weights = trainer.weights
        self._average = tf.train.ExponentialMovingAverage(decay, num_updates=trainer.optimizer.iterations)
        self._average.apply(self._weights)  # makes the variables
        self.averages: list[tf.Variable] = [self._average.average(weight) for weight in self._weights]
        # In one graph: eagerly, hundreds of small operations would take a considerable part of each step.
        self._update, self._exchange = tf.function(self._update_all), tf.function(self._exchange_all)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Moves the averages towards the weights."""
        self._update()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        """Exchanges weights and averages."""
        self._exchange()

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        """Exchanges them back."""
        self._exchange()

    def replace_weights(self) -> None:
        """Replaces the weights by their averages, for good: training has ended."""
        for weight, average in zip(self._weights, self.averages, strict=True):
            weight.assign(average)

    def _update_all(self):
        self._average.apply(self._weights)

    def _exchange_all(self):
        for weight, average in zip(self._weights, self.averages, strict=True):
            value = tf.identity(weight.read_value())
            weight.assign(average)
            average.assign(value)
