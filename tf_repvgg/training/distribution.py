"""Training on several devices and machines by TensorFlow's strategies (tf.distribute)."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from tf_repvgg.data.shards import WHOLE, Shard
from tf_repvgg.training.cluster import Cluster

STRATEGIES = ("none", "mirrored", "multi_worker", "tpu")


class Distribution:
    """How a training is spread over devices, and what its processes agree on.

    Without a strategy everything here does nothing.

    Args:
      strategy: Strategy of TensorFlow; None to train on one device.
      cluster: The workers of the strategy; None for a single process.

    Attributes:
      replicas: Number of replicas of the network, one per device, of all processes.

    Example:
      >>> from tf_repvgg.training.distribution import Distribution
      >>> distribution = Distribution()
      >>> distribution.replicas, distribution.is_chief, distribution.agree(is_ending=True)
      (1, True, {'is_ending': True})
    """

    def __init__(self, strategy: tf.distribute.Strategy | None = None, cluster: Cluster | None = None) -> None:
        self._strategy = strategy
        self._cluster = cluster
        self.replicas: int = strategy.num_replicas_in_sync if strategy else 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files of the run."""
        return self._cluster is None or self._cluster.is_chief

    def scope(self) -> contextlib.AbstractContextManager:
        """A context in which networks and optimizers get variables that all replicas share."""
        return self._strategy.scope() if self._strategy else contextlib.nullcontext()

    def distribute(self, make_batches: Callable[[Shard], tf.data.Dataset]) -> tf.data.Dataset:
        """The input of all replicas, for `fit`.

        Args:
          make_batches: Function that makes the batches of some replicas.
        """
        if not self._strategy:
            return make_batches(WHOLE)

        def make_part(context):
            count = self.replicas // context.num_input_pipelines
            first = count * context.input_pipeline_id
            return make_batches(Shard(range(first, first + count), self.replicas))

        return self._strategy.distribute_datasets_from_function(make_part)

    def agree(self, **conditions: bool) -> dict[str, bool]:
        """Whether each condition holds for any process. All processes must call this, and wait for each other."""
        if not self._has_others:
            return conditions
        counts = self._add_up(np.array(list(conditions.values()), np.int32))
        return {name: bool(count) for name, count in zip(conditions, counts, strict=True)}

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self.agree(is_waiting=True)

    def check_agreement(self, **values: Mapping[str, str | int]) -> None:
        """Checks that all processes have the same values. All must call this.

        Args:
          **values: Values by name, by the kind of thing that is named: flags={"epochs": "--epochs=3"}.

        Raises:
          ValueError: If a worker has another value than the chief; names it.
        """
        if not (self._has_others and self._cluster):
            return
        chief, *others = map(json.loads, self._exchange(self._cluster, json.dumps(values)))
        for index, records in enumerate(others, start=1):
            for kind in values:
                record, expected = records[kind], chief[kind]
                for name in sorted(expected.keys() | record.keys()):
                    if record.get(name) != expected.get(name):
                        raise ValueError(
                            f"{self._cluster.describe(index)} has another value of {name} ({kind}) than the chief: "
                            f"{record.get(name, 'none')} instead of {expected.get(name, 'none')}; all workers must "
                            "have the same"
                        )

    @contextlib.contextmanager
    def explain_losses(self) -> Iterator[None]:
        """A context in which the loss of another worker raises an error that names it.

        Raises:
          ConnectionError: If another worker is lost.
        """
        try:
            yield
        except tf.errors.OpError as error:
            message = self._cluster.explain_loss(error) if self._cluster else None
            if message is None:
                raise
            raise ConnectionError(message) from None

    @property
    def _has_others(self):
        return self._cluster is not None and len(self._cluster.addresses) > 1

    def _exchange(self, cluster, text):
        """The texts of all workers."""
        content = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        lengths = self._gather(cluster, np.array([len(content)], np.int32))[:, 0]
        rows = self._gather(cluster, np.pad(content, (0, lengths.max() - len(content))))
        return [bytes(row[:length].astype(np.uint8)).decode() for row, length in zip(rows, lengths, strict=True)]

    def _gather(self, cluster, row):
        """A row of numbers of each worker."""
        rows = np.zeros([len(cluster.addresses), len(row)], np.int32)
        rows[cluster.index] = row
        local_replicas = self.replicas // len(rows)
        return self._add_up(rows) // local_replicas

    @functools.cached_property
    def _add_up(self):
        """A function that returns the sum of an array over all replicas."""
        strategy = self._strategy
        assert strategy is not None

        def add(numbers):
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce("SUM", tf.identity(numbers))  # on the replica's own device

        run = tf.function(lambda numbers: strategy.run(add, (numbers,)), reduce_retracing=True)
        return lambda numbers: strategy.experimental_local_results(run(tf.constant(numbers)))[0].numpy()


def mirror() -> Distribution:
    """A replica on each GPU of this machine, or, without GPUs, on each logical CPU device."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return Distribution(tf.distribute.MirroredStrategy([device.name for device in devices]))


def connect_tpu(name: str | None) -> Distribution:
    """A replica on each core of a TPU.

    Args:
      name: Name or address of the TPU; None for that of the environment.

    Raises:
      ValueError: If there is no such TPU.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(name or "local")
        return Distribution(tf.distribute.TPUStrategy(resolver))
    except Exception as error:  # of many kinds: no such machine, no library, no permission
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"no TPU {name or 'on this machine'} ({reason}); name one with --tpu") from None
