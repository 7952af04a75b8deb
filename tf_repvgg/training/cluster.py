"""The workers of a training on several machines: read from TF_CONFIG, connected within a time, and named when lost."""

import dataclasses
import re
import socket
import threading
from collections.abc import Callable
from typing import Annotated, TypedDict

import tensorflow as tf
from msgspec import Meta

from tf_repvgg import json_records, native_output

VARIABLE = "TF_CONFIG"
_FORM = '{"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": "worker", "index": 0}}'
_SECONDS_TO_ANSWER = 2
# What TensorFlow raises where another process has ended.
_LOSSES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnknownError,
)

_Addresses = Annotated[list[Annotated[str, Meta(pattern=r"^\S+:\d{1,5}$")]], Meta(min_length=1)]
_Workers = TypedDict("_Workers", {"worker": _Addresses})


class _Task(TypedDict):
    type: str
    index: Annotated[int, Meta(ge=0)]


class _Config(TypedDict):
    """Content of TF_CONFIG, as far as it is used here."""

    cluster: _Workers
    task: _Task


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers that train together, and which of them this process is.

    Attributes:
      addresses: Host and port of each worker. The first one is the chief.
      index: Number of this worker.

    Example:
      >>> from tf_repvgg.training.cluster import Cluster
      >>> text = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
      >>> Cluster.read(text)
      Cluster(addresses=('a:1', 'b:1'), index=1)
    """

    addresses: tuple[str, ...]
    index: int

    @classmethod
    def read(cls, text: str | None) -> "Cluster":
        """Reads TF_CONFIG.

        Args:
          text: Value of the environment variable; None if it is not set.

        Raises:
          ValueError: If it is not set, or does not describe a cluster of workers and this one among them.
        """
        if not text:
            raise ValueError(
                f"the environment variable {VARIABLE} is not set; give every worker its own: {VARIABLE}='{_FORM}'"
            )
        try:
            config = json_records.parse(text, _Config, VARIABLE)
        except ValueError as error:
            raise ValueError(f"{error}; it should be like {_FORM}") from None
        if kinds := sorted(config["cluster"].keys() - {"worker"}):
            raise ValueError(f"{VARIABLE}: cluster has {kinds[0]!r}, but all processes train alike; name only 'worker'")
        addresses, task = config["cluster"]["worker"], config["task"]
        if task["type"] != "worker":
            raise ValueError(f"{VARIABLE}: task.type is {task['type']!r}; it must be 'worker'")
        if task["index"] >= len(addresses):
            raise ValueError(
                f"{VARIABLE}: task.index is {task['index']}, but cluster.worker has {len(addresses)} addresses; "
                f"give 0 to {len(addresses) - 1}"
            )
        if twice := [address for address in addresses if addresses.count(address) > 1]:
            raise ValueError(f"{VARIABLE}: cluster.worker has the address {twice[0]!r} twice; give each worker its own")
        return cls(tuple(addresses), task["index"])

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the files of the run."""
        return self.index == 0

    def describe(self, index: int) -> str:
        """Number and address of a worker, for messages."""
        return f"worker {index} ({self.addresses[index]})"

    def connect(
        self, seconds: float, end: Callable[[ValueError], None]
    ) -> tf.distribute.MultiWorkerMirroredStrategy:
        """Waits for all workers.

        Nothing may have run in TensorFlow before.

        Args:
          seconds: Time after which `end` is called.
          end: Function that ends the process, in a thread of its own, with an error that names who is missing.

        Raises:
          ValueError: If the port of this worker is in use, or TensorFlow refuses the cluster.
        """
        self._check_port()
        timer = threading.Timer(seconds, lambda: end(self._explain_absence(seconds)))
        timer.daemon = True
        timer.start()
        try:
            with native_output.hide():
                return tf.distribute.MultiWorkerMirroredStrategy()
        except (tf.errors.OpError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.describe(self.index)} cannot join the others: {reason}; see {VARIABLE}") from None
        finally:
            timer.cancel()

    def explain_loss(self, error: Exception) -> str | None:
        """Says which worker an error of TensorFlow means.

        Args:
          error: Error of a step.

        Returns:
          A message; None if the error is not about other workers.
        """
        if not isinstance(error, _LOSSES):
            return None
        others = set(range(len(self.addresses))) - {self.index}
        lost = sorted({int(number) for number in re.findall(r"/task:(\d+)", str(error))} & others)
        lost = lost or [index for index in sorted(others) if not self._answers(index)]
        if not lost:
            return None
        names = " and ".join(self.describe(index) for index in lost)
        return f"lost {names}; start the same command on all workers again to continue from the last checkpoint"

    def _check_port(self):
        host, _, port = self.addresses[self.index].rpartition(":")
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"{self.describe(self.index)} cannot listen on port {port} of {host} "
                f"({getattr(error, 'strerror', None) or error}); give another one in {VARIABLE}"
            ) from None

    def _answers(self, index):
        host, _, port = self.addresses[index].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
            return True
        except (OSError, OverflowError):
            return False

    def _explain_absence(self, seconds):
        absent = [index for index in range(len(self.addresses)) if index != self.index and not self._answers(index)]
        if not absent:
            return ValueError(
                f"all workers answer, but they have not formed a cluster within --connect_seconds={seconds:g}; give "
                f"all of them the same {VARIABLE} but for task.index, and no two the same index"
            )
        names = " and ".join(self.describe(index) for index in absent)
        return ValueError(
            f"{names} did not answer within --connect_seconds={seconds:g}; start the same command there, or correct "
            f"{VARIABLE}"
        )
