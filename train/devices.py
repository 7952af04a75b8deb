"""The devices and machines of a run: flags, and the strategy that they describe."""

import os

from absl import flags

from tf_repvgg.training import cluster, distribution

FLAGS = flags.FLAGS

flags.DEFINE_enum(
    "strategy",
    "none",
    distribution.STRATEGIES,
    "Devices to train on. none: one. mirrored: all GPUs of this machine. multi_worker: all machines that the "
    "environment variable TF_CONFIG names; start the same command on each. tpu: the cores of a TPU.",
)
flags.DEFINE_string("tpu", None, "Name or address of the TPU of --strategy=tpu; by default that of this machine.")
flags.DEFINE_float(
    "connect_seconds",
    300,
    "Seconds that a worker of --strategy=multi_worker waits for the others.",
    lower_bound=1,
    upper_bound=1e6,
)


def read_cluster() -> cluster.Cluster | None:
    """The workers of --strategy=multi_worker; None for other strategies.

    Raises:
      ValueError: If TF_CONFIG does not describe them, or a flag has no effect.
    """
    if FLAGS.tpu is not None and FLAGS.strategy != "tpu":
        raise ValueError(f"--tpu={FLAGS.tpu} has no effect with --strategy={FLAGS.strategy}; use --strategy=tpu")
    if FLAGS.strategy != "multi_worker":
        return None
    return cluster.Cluster.read(os.environ.get(cluster.VARIABLE))


def connect(workers: cluster.Cluster | None) -> distribution.Distribution:
    """Makes the devices ready; waits for other workers.

    Args:
      workers: Workers of --strategy=multi_worker.

    Raises:
      ValueError: If there is no TPU; or if this worker cannot listen on its port, or others do not answer in time.
    """
    match FLAGS.strategy:
        case "mirrored":
            return distribution.mirror()
        case "tpu":
            return distribution.connect_tpu(FLAGS.tpu)
        case "multi_worker":
            assert workers is not None
            return distribution.Distribution(workers.connect(FLAGS.connect_seconds), workers)
    return distribution.Distribution()
