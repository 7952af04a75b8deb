"""A codebook in training: its variables, how they move, and how weights become its entries."""

import dataclasses
import numbers

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
      number_of_clusters: states, 2 to 256.
      cluster_centroids_init: None for k-means, or a `tfmot.clustering.keras.CentroidInitialization`.
      cluster_per_channel: a codebook for each output channel, or one.
      cluster_gradient_aggregation: tfmot's `GradientAggregation`, with train_centroids.
      centroid_update_rate: share of the way to the mean of its weights that a centroid moves, 0 (not at all) to 1.
      centroid_update_steps: training steps from one such move to the next.
      train_centroids: whether the optimizer moves centroids too, by tfmot's gradient.
      ramp_steps: steps (calls, of a layer that is called more than once) in which quantization sets in: in training, a
        layer computes with a mixture of its latent weights and their centroids, the share of centroids growing evenly
        from 0 to 1 (alpha-blending, arXiv:1903.01061, with a linear schedule, and gradients that pass straight through
        to the weights all along). Elsewhere, in evaluation say, it is 1 at once.

    Raises:
      ValueError: for values out of range.
    """

    number_of_clusters: int
    cluster_centroids_init: CentroidInitialization | None = None
    cluster_per_channel: bool = False
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM
    centroid_update_rate: float = 0.1
    centroid_update_steps: int = 10
    train_centroids: bool = False
    ramp_steps: int = 0

    def __post_init__(self):
        if not (isinstance(self.number_of_clusters, numbers.Integral) and 2 <= self.number_of_clusters <= 256):
            raise ValueError(
                f"number_of_clusters is {self.number_of_clusters!r}; it must be a whole number from 2 to 256"
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

    def as_arguments(self) -> dict:
        """{argument: value} of a wrapper."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_config(self) -> dict:
        """The same, as a layer's configuration can hold it."""
        initialization = self.cluster_centroids_init
        return self.as_arguments() | {
            "number_of_clusters": int(self.number_of_clusters),
            "centroid_update_steps": int(self.centroid_update_steps),
            "ramp_steps": int(self.ramp_steps),
            "cluster_centroids_init": initialization and initialization.value,
            "cluster_gradient_aggregation": self.cluster_gradient_aggregation.value,
        }

    @classmethod
    def arguments_from(cls, config) -> dict:
        """The arguments that `to_config` wrote into a configuration, and what else is in there."""
        initialization = config["cluster_centroids_init"]
        return config | {
            "cluster_centroids_init": initialization and CentroidInitialization(initialization),
            "cluster_gradient_aggregation": GradientAggregation(config["cluster_gradient_aggregation"]),
        }


class MovingCodebook:
    """The codebook of one weight tensor; its variables belong to the layer that it serves, which saves them.

    Weights are matrices [rows, output channels] throughout, which the layer keeps.

    Args:
      owner: Keras wrapper around a layer, being built.
      name: of the weights.
      weights: what centroids start from.
      training: see `CodebookTraining`.

    Raises:
      ValueError: if the weights are not finite.
    """

    def __init__(self, owner, name, weights, training: CodebookTraining):
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
        # What weights are frozen to; a byte each.
        self._assignments = owner.add_weight(f"assignments_{name}", weights.shape, tf.uint8, zeros, trainable=False)
        self._steps = owner.add_weight(f"steps_{name}", [], tf.int64, zeros, trainable=False)
        self._is_frozen = owner.add_weight(f"is_frozen_{name}", [], tf.bool, zeros, trainable=False)

    @property
    def is_frozen(self):
        """Whether clusters rest: bool tensor."""
        return tf.convert_to_tensor(self._is_frozen)

    def grid(self):
        """Centroids as they are multiplied with, [1 or channels, states]: int8 codes times `scale`.

        Ascending; but while clusters rest, each stays the one that its weights were assigned to.
        """
        return codebooks.ordered_on_grid(self.is_frozen, self.centroids)[0]

    def assignments(self, weights):
        """Index of the centroid of each weight, int32 [rows, channels]; while clusters rest, the one that it keeps."""
        if self._is_frozen.numpy():
            return tf.cast(self._assignments, tf.int32)
        return codebooks.assign(weights, self.grid())

    def scale(self):
        """The step of the grid, [1 or channels]."""
        return codebooks.ordered_on_grid(self.is_frozen, self.centroids)[1]

    def quantized(self, weights):
        """The centroid of each weight; differentiable in both."""
        return codebooks.quantize(
            weights,
            self.grid(),
            self.is_frozen,
            self._assignments,
            _AGGREGATIONS[self._training.cluster_gradient_aggregation] if self._training.train_centroids else None,
        )

    def in_training(self, weights):
        """What a training step computes with: `quantized`, or a mixture while the ramp lasts; differentiable too."""
        found = self.quantized(weights)
        if not self._training.ramp_steps:
            return found
        share = tf.cast(self._steps, tf.float32) / self._training.ramp_steps
        share = tf.where(self.is_frozen, 1.0, tf.minimum(share, 1.0))
        return share * found + (1.0 - share) * weights

    def step(self, weights):
        """Counts a training step, and moves centroids when it is time."""
        self._steps.assign_add(1)
        is_due = (self._steps % self._training.centroid_update_steps == 0) & ~self.is_frozen
        rate = self._training.centroid_update_rate
        if rate or self._training.train_centroids:  # at rate 0, only clusters without weights start anew
            self.centroids.assign(codebooks.lloyd_step_if(is_due, weights, self.centroids, rate))

    def freeze(self, weights, frozen=True):
        """Fixes which centroid each weight has, or lets it change again; in effect at once.

        Meanwhile no step of Lloyd's algorithm moves centroids; the optimizer still does, if it trains them.
        """
        if frozen and not self._is_frozen.numpy():
            self._assignments.assign(tf.cast(self.assignments(weights), tf.uint8))
            self.centroids.assign(tf.sort(self.centroids, axis=-1))
        self._is_frozen.assign(frozen)
