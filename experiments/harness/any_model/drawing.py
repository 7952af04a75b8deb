"""Draws from one seed: choices, chances and constants."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# ReLU more often than the others, as in networks that people deploy.
_ACTIVATIONS = (
    *("relu", "relu", "relu", "relu6", "linear", "sigmoid", "tanh", "swish", "elu", "selu", "softplus"),
    *("hard_sigmoid", "gelu", "softsign", "exponential"),
)


class Drawing:
    """A source of random decisions.

    Args:
      seed: Seed, or several numbers that make up one.

    Attributes:
      generator: NumPy's generator, for draws of other kinds.
    """

    def __init__(self, *seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def choose(self, options: Sequence[Any]) -> Any:
        """One of several options, each with the same chance."""
        return options[self.generator.integers(len(options))]

    def decide(self, chance: float) -> bool:
        """True with the given chance, from 0 to 1."""
        return bool(self.generator.random() < chance)

    def choose_activation(self) -> str:
        """Keras's name of an activation."""
        return self.choose(_ACTIVATIONS)

    def draw_constant(self, channels: int) -> np.ndarray:
        """A constant away from zero, float32: a scalar, or one number for each channel."""
        size = () if self.decide(0.5) else (channels,)
        constant = self.generator.uniform(0.3, 3.0, size) * self.choose([1.0, 1.0, -1.0])
        return constant.astype("float32")

    def draw_matrix(self, rows: int, columns: int) -> np.ndarray:
        """A matrix of normally distributed numbers, float32."""
        return self.generator.normal(size=(rows, columns)).astype("float32")
