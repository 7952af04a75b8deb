"""Calibration images, and running models on them batch by batch."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

# Images of a batch: fewer if they are large, since memory that is mapped and unmapped for every tensor takes more time
# than its values.
_BATCH, _SMALLEST_BATCH, _VALUES = 64, 8, 2**21
# Images that methods do not learn from, but judge their results by: one in five, where there are that many.
_HELD_OUT = 5


class Calibration:
    """Calibration images, and the values of a model's tensors on them.

    Args:
      inputs: An array [count, ...] for each input of the models to be run, such as float32 images
        [count, height, width, channels]; the array alone if there is one input; None for methods that need no images.
    """

    def __init__(self, inputs: np.ndarray | Sequence[np.ndarray] | None) -> None:
        self._inputs = [inputs] if isinstance(inputs, np.ndarray) else inputs
        self._runs: dict[tuple[int, ...], tuple[list, Callable]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there are no images."""
        return self._inputs is None

    @property
    def inputs(self) -> Sequence[np.ndarray]:
        """The array of each input, [count, ...].

        Raises:
          ValueError: If there are no images.
        """
        if self._inputs is None:
            raise ValueError("there are no calibration images; this needs at least one")
        return self._inputs

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.inputs[0])

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the images to learn from, and of a fifth of all that is held out to judge the result by.

        Of fewer than five images, all serve both purposes.

        Args:
          seed: Seed of the random choice.
        """
        order = np.random.default_rng(seed).permutation(self.count)
        held_out = self.count // _HELD_OUT
        return (order[held_out:], order[:held_out]) if held_out else (order, order)

    def take(self, indices: np.ndarray) -> "Calibration":
        """Some of the images."""
        return Calibration([values[indices] for values in self.inputs])

    def compute(self, model: keras.Model, tensors: list) -> list[np.ndarray]:
        """Values of tensors of a model on all images, each [count, ...]."""
        batches = list(self.compute_batches(model, tensors))
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    def compute_means(self, model: keras.Model, tensors: list) -> list[np.ndarray]:
        """Means of tensors of a model over all images, each [1, ...]."""
        sums: list[Any] = [0.0] * len(tensors)
        for batch in self.compute_batches(model, tensors):
            sums = [total + np.sum(values, axis=0, keepdims=True) for total, values in zip(sums, batch, strict=True)]
        return [total / self.count for total in sums]

    def compute_batches(self, model: keras.Model, tensors: list) -> Iterator[list[np.ndarray]]:
        """Values of tensors of a model, batch by batch."""
        # The tensors are kept, so that no other tensor gets their ids. The first run of a list of tensors is eager:
        # many are run only once, such as a layer's inputs, and a trace would take longer. A traced graph reads weights
        # anew in each run.
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._runs:
            run: Callable = functools.partial(keras.Model(model.inputs, tensors), training=False)
            self._runs[key] = tensors, tf.function(run)
        else:
            _, run = self._runs[key]
        for batch in zip(*self.split_inputs(model), strict=True):
            outputs = run([tf.constant(values) for values in batch])
            yield [values.numpy() for values in tf.nest.flatten(outputs)]

    def split_inputs(self, model: keras.Model) -> list[list[np.ndarray]]:
        """The batches of each input in which a model computes all images."""
        largest = max(math.prod(values.shape[1:]) for values in self.inputs)
        size = model.inputs[0].shape[0] or min(max(_VALUES // max(largest, 1), _SMALLEST_BATCH), _BATCH)
        starts = range(0, self.count, size)
        return [[values[start : start + size] for start in starts] for values in self.inputs]

    def compute_layers(self, model: keras.Model, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Yields {layer name: outputs of that layer of a model}, batch by batch."""
        tensors = [model.get_layer(name).output for name in names]
        for values in self.compute_batches(model, tensors):
            yield dict(zip(names, values, strict=True))
