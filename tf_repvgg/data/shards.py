"""The part of each batch that a process computes: batches split over replicas, the copies of a network in training."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Shard:
    """Replicas of one process, among all replicas that train together.

    Replica j of n computes images floor(j * size / n) to floor((j + 1) * size / n) of each batch. So all replicas
    together compute the batches of a single one, each image once, whatever their number.

    Attributes:
      replicas: Numbers of the replicas of this process.
      total: Number of the replicas of all processes.

    Raises:
      ValueError: If there are no replicas, or numbers beyond `total`.

    Example:
      >>> from tf_repvgg.data.shards import Shard
      >>> shard = Shard(range(2, 4), total=4)
      >>> shard.bounds(10)
      (5, 10)
      >>> is_computed, sizes = shard.split([10, 4])
      >>> is_computed.nonzero()[0].tolist(), sizes.tolist()
      ([5, 6, 7, 8, 9, 12, 13], [2, 3, 1, 1])
    """

    replicas: range = range(1)
    total: int = 1

    def __post_init__(self) -> None:
        if not self.replicas or not set(self.replicas) <= set(range(self.total)):
            raise ValueError(f"replicas are {self.replicas}; they must be among the {self.total} of all processes")

    @property
    def is_whole(self) -> bool:
        """Whether a single replica computes all images."""
        return self.total == 1

    def bounds(self, size: int | tf.Tensor) -> tuple[int | tf.Tensor, int | tf.Tensor]:
        """(first, last + 1) of the images in a batch that this process computes.

        Args:
          size: Images in the batch.
        """
        return self.replicas.start * size // self.total, self.replicas.stop * size // self.total

    def split(self, batch_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Splits the batches of an epoch.

        Args:
          batch_sizes: Images in each batch.

        Returns:
          For each image of the epoch, whether this process computes it; and the number of images in the part of each
          replica of this process: those of the first batch, those of the second, and so on.
        """
        sizes = np.asarray(batch_sizes, np.int64)
        positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        first, end = (np.repeat(bound, sizes) for bound in self.bounds(sizes))
        borders = np.arange(self.replicas.start, self.replicas.stop + 1) * sizes[:, np.newaxis] // self.total
        return (first <= positions) & (positions < end), np.diff(borders).ravel()


WHOLE = Shard()  # of a process that trains alone
