"""A codebook in training: its variables, how centroids move, and how weights are quantized with it."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)

from tf_repvgg.quantization import codebooks
from tf_repvgg.quantization.checks import check_finite

_AGGREGATIONS = {GradientAggregation.SUM: "sum", GradientAggregation.AVG: "mean"}
_KNOWN = {
    "cluster_centroids_init": (None, *CentroidInitialization),
    "cluster_gradient_aggregation": tuple(GradientAggregation),
}


@dataclasses.dataclass(frozen=True)
class CodebookTraining:
    """How codebooks start and how they move.

    Attributes:
      number_of_clusters: Number of centroids in a codebook, from 2 to 256.
      cluster_centroids_init: Initialization of the centroids, a `tfmot.clustering.keras.CentroidInitialization`; None
        for k-means.
      cluster_per_channel: Whether every output channel has its own codebook; otherwise the weights share one.
      cluster_gradient_aggregation: Aggregation of tfmot's gradient to a centroid over its weights; has an effect with
        `train_centroids` only.
      centroid_update_rate: Share of the way to the mean of its weights that a centroid moves, from 0 (not at all) to 1.
      centroid_update_steps: Training steps from one such move to the next.
      train_centroids: Whether the optimizer moves centroids too, by tfmot's gradient.
      ramp_steps: Training steps (calls, for a layer that is called more than once) in which quantization sets in. In
        training, a layer then computes with a mixture of its latent weights and their centroids. The share of the
        centroids grows linearly from 0 to 1, and gradients pass straight through to the latent weights (alpha-blending,
        arXiv:1903.01061). Outside of training the share is always 1.

    Raises:
      ValueError: If a value is out of range.
    """

    number_of_clusters: int
    cluster_centroids_init: CentroidInitialization | None = None
    cluster_per_channel: bool = False
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM
    centroid_update_rate: float = 0.1
    centroid_update_steps: int = 10
    train_centroids: bool = False
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        allowed = codebooks.NUMBERS_OF_CLUSTERS
        if not (isinstance(self.number_of_clusters, numbers.Integral) and self.number_of_clusters in allowed):
            raise ValueError(
                f"number_of_clusters is {self.number_of_clusters!r}; it must be a whole number from {allowed[0]} to "
                f"{allowed[-1]}"
            )
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known: {', '.join(map(str, known))}")
        if not 0 <= self.centroid_update_rate <= 1:
            raise ValueError(f"centroid_update_rate is {self.centroid_update_rate!r}; it must be from 0 to 1")
        if not (isinstance(self.centroid_update_steps, numbers.Integral) and self.centroid_update_steps > 0):
            raise ValueError(
                f"centroid_update_steps is {self.centroid_update_steps!r}; it must be a whole number above 0"
            )
        if not (isinstance(self.ramp_steps, numbers.Integral) and self.ramp_steps >= 0):
            raise ValueError(f"ramp_steps is {self.ramp_steps!r}; it must be a whole number, 0 for none")

    def as_arguments(self) -> dict[str, Any]:
        """The values as keyword arguments of a wrapper."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_config(self) -> dict[str, Any]:
        """The values as entries for a layer's configuration, which holds no NumPy numbers and no enumerations."""
        initialization = self.cluster_centroids_init
        return self.as_arguments() | {
            "number_of_clusters": int(self.number_of_clusters),
            "centroid_update_steps": int(self.centroid_update_steps),
            "ramp_steps": int(self.ramp_steps),
            "cluster_centroids_init": initialization and initialization.value,
            "cluster_gradient_aggregation": self.cluster_gradient_aggregation.value,
        }

    @classmethod
    def arguments_from(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Turns the entries of `to_config` in a layer's configuration back into arguments; keeps all other entries.

        Args:
          config: Configuration of a wrapper.
        """
        initialization = config["cluster_centroids_init"]
        return dict(config) | {
            "cluster_centroids_init": initialization and CentroidInitialization(initialization),
            "cluster_gradient_aggregation": GradientAggregation(config["cluster_gradient_aggregation"]),
        }


class MovingCodebook:
    """The codebook of one weight tensor. A layer owns its variables, and thus saves them.

    All methods take latent weights as matrices [rows, output channels]. The owner keeps these weights.

    Args:
      owner: Keras wrapper around a layer, while it is being built.
      name: Name of the weights.
      weights: Weights from which the centroids start.
      training: Settings.

    Attributes:
      centroids: Centroids before they are rounded to the grid, a float32 variable [1 or channels, clusters].

    Raises:
      ValueError: If the weights are not finite.
    """

    def __init__(self, owner: keras.layers.Wrapper, name: str, weights: tf.Tensor, training: CodebookTraining) -> None:
        check_finite(owner.layer, weights)
        self._training = training
        start = codebooks.initial_centroids(
            weights, training.number_of_clusters, training.cluster_per_channel, training.cluster_centroids_init
        )
        zeros = keras.initializers.Zeros()
        self.centroids = owner.add_weight(
            f"cluster_centroids_{name}",
            start.shape,
            tf.float32,
            keras.initializers.Constant(start.numpy()),
            trainable=training.train_centroids,
        )
        # Which centroid each weight has while clusters are frozen; one byte per weight.
        self._assignments = owner.add_weight(f"assignments_{name}", weights.shape, tf.uint8, zeros, trainable=False)
        self._steps = owner.add_weight(f"steps_{name}", [], tf.int64, zeros, trainable=False)
        self._is_frozen = owner.add_weight(f"is_frozen_{name}", [], tf.bool, zeros, trainable=False)

    @property
    def is_frozen(self) -> tf.Tensor:
        """Whether clusters are frozen, a bool scalar."""
        return tf.convert_to_tensor(self._is_frozen)

    def grid(self) -> tf.Tensor:
        """The centroids rounded to int8 codes times `scale`, [1 or channels, clusters].

        They are in ascending order; while clusters are frozen, they keep the order in which weights were assigned.
        """
        return codebooks.sort_and_round(self.is_frozen, self.centroids)[0]

    def scale(self) -> tf.Tensor:
        """The scale of the grid, [1 or channels]."""
        return codebooks.sort_and_round(self.is_frozen, self.centroids)[1]

    def assignments(self, weights: tf.Tensor) -> tf.Tensor:
        """The index of each weight's centroid: the nearest, or, while clusters are frozen, the assigned one.

        Args:
          weights: Latent weights.

        Returns:
          Indices, int32 [rows, channels].
        """
        if self._is_frozen.numpy():
            return tf.cast(self._assignments, tf.int32)
        return codebooks.assign(weights, self.grid())

    def quantize(self, weights: tf.Tensor) -> tf.Tensor:
        """Replaces each weight by its centroid; differentiable with respect to both.

        Args:
          weights: Latent weights.
        """
        return codebooks.quantize(
            weights,
            self.grid(),
            self.is_frozen,
            self._assignments,
            _AGGREGATIONS[self._training.cluster_gradient_aggregation] if self._training.train_centroids else None,
        )

    def quantize_in_training(self, weights: tf.Tensor) -> tf.Tensor:
        """Quantizes weights for a training step: fully, or, during the ramp, in part; differentiable like `quantize`.

        Args:
          weights: Latent weights.
        """
        quantized = self.quantize(weights)
        if not self._training.ramp_steps:
            return quantized
        share = tf.cast(self._steps, tf.float32) / self._training.ramp_steps
        share = tf.where(self.is_frozen, 1.0, tf.minimum(share, 1.0))
        return share * quantized + (1.0 - share) * weights

    def step(self, weights: tf.Tensor) -> None:
        """Counts a training step, and moves the centroids when a move is due.

        Args:
          weights: Latent weights.
        """
        self._steps.assign_add(1)
        is_due = (self._steps % self._training.centroid_update_steps == 0) & ~self.is_frozen
        rate = self._training.centroid_update_rate
        if rate or self._training.train_centroids:  # at rate 0, only clusters without weights start anew
            self.centroids.assign(codebooks.take_lloyd_step_if(is_due, weights, self.centroids, rate))

    def freeze(self, weights: tf.Tensor, frozen: bool = True) -> None:
        """Freezes which centroid each weight has, or unfreezes it; takes effect at once.

        While clusters are frozen, no step of Lloyd's algorithm moves centroids. The optimizer still does, if it trains
        them.

        Args:
          weights: Latent weights.
          frozen: Whether clusters are frozen from now on.
        """
        if frozen and not self._is_frozen.numpy():
            self._assignments.assign(tf.cast(self.assignments(weights), tf.uint8))
            self.centroids.assign(tf.sort(self.centroids, axis=-1))
        self._is_frozen.assign(frozen)
