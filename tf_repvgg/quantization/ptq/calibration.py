"""Calibration images, and running models on them batch by batch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

# Normalized images are within a few units of zero; pixels from 0 to 255 are not.
LARGEST_INPUT = 32.0

_BATCH = 64


class Calibration:
    """Calibration images, and the values of a model's tensors on them.

    Args:
      images: Float32 images [count, height, width, channels]; None for methods that need none.
    """

    def __init__(self, images: np.ndarray | None) -> None:
        self._images = images
        self._runs: dict[tuple[int, ...], tuple[list, Callable]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether there are no images."""
        return self._images is None

    @property
    def images(self) -> np.ndarray:
        """All images, [count, height, width, channels].

        Raises:
          ValueError: If there are none.
        """
        if self._images is None:
            raise ValueError("there are no calibration images; this needs at least one")
        return self._images

    def compute(self, model: keras.Model, tensors: list) -> list[np.ndarray]:
        """Values of tensors of a model on all images, each [count, ...]."""
        batches = list(self.compute_batches(model, tensors))
        return [np.concatenate(parts) for parts in zip(*batches, strict=True)]

    def compute_means(self, model: keras.Model, tensors: list) -> list[np.ndarray]:
        """Means of tensors of a model over all images, each [1, ...]."""
        sums: list[Any] = [0.0] * len(tensors)
        for batch in self.compute_batches(model, tensors):
            sums = [total + np.sum(values, axis=0, keepdims=True) for total, values in zip(sums, batch, strict=True)]
        return [total / len(self.images) for total in sums]

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
        for start in range(0, len(self.images), _BATCH):
            outputs = run(tf.constant(self.images[start : start + _BATCH]))
            yield [values.numpy() for values in tf.nest.flatten(outputs)]
