"""The workers of a training on several machines: read from TF_CONFIG, connected within a time, and named when lost."""

import contextlib
import dataclasses
import faulthandler
import json
import re
import socket
import threading
import time
from typing import Annotated, TypedDict

import tensorflow as tf
from msgspec import Meta

from tf_repvgg import interruption, json_records

VARIABLE = "TF_CONFIG"
_FORM = '{"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": "worker", "index": 0}}'
_SECONDS_TO_ANSWER = 2
_SECONDS_BETWEEN_CALLS = 0.1
_SECONDS_TO_FORM = 60
_LONGEST_GREETING = 2**20
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


class _Workers(TypedDict):
    worker: _Addresses


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

    def connect(self, seconds: float) -> tf.distribute.MultiWorkerMirroredStrategy:
        """Waits for all workers, and connects them. Nothing may have run in TensorFlow before.

        TensorFlow waits for others without end, and Python stands still meanwhile. So workers meet before, and a wait
        that is too long ends the process.

        Args:
          seconds: Time to wait for the other workers.

        Raises:
          ValueError: If this worker cannot listen on its port, another one does not answer in time, or has another
            cluster in TF_CONFIG; names it.
        """
        self._meet(seconds)
        faulthandler.dump_traceback_later(seconds + _SECONDS_TO_FORM, exit=True)
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        finally:
            faulthandler.cancel_dump_traceback_later()
            interruption.renew_handlers()

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

    def _meet(self, seconds):
        """Waits until all other workers have answered."""
        end = time.monotonic() + seconds
        absent = set(range(len(self.addresses))) - {self.index}
        with self._greet():
            while absent:
                absent -= {index for index in sorted(absent) if self._answers(index)}
                if absent and time.monotonic() > end:
                    names = " and ".join(map(self.describe, sorted(absent)))
                    raise ValueError(
                        f"{names} did not answer within --connect_seconds={seconds:g}; start the same command there, "
                        f"or correct {VARIABLE}"
                    )
                time.sleep(_SECONDS_BETWEEN_CALLS if absent else 0)

    @contextlib.contextmanager
    def _greet(self):
        """A context in which whoever calls this worker hears its index and the cluster that it knows."""
        host, _, port = self.addresses[self.index].rpartition(":")
        try:
            server = socket.create_server(("", int(port)))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"{self.describe(self.index)} cannot listen on port {port} of {host} "
                f"({getattr(error, 'strerror', None) or error}); give another one in {VARIABLE}"
            ) from None
        server.settimeout(_SECONDS_BETWEEN_CALLS)
        is_over = threading.Event()

        def answer():
            while not is_over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(self._greeting(self.index))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        except ValueError:
            time.sleep(_SECONDS_TO_ANSWER)  # so that others hear why
            raise
        finally:
            is_over.set()
            thread.join()
            server.close()

    def _greeting(self, index):
        return json.dumps({"index": index, "workers": self.addresses}).encode() + b"\n"

    def _answers(self, index):
        """Whether a worker answers: with its greeting, or as TensorFlow, which it has started since.

        Raises:
          ValueError: If it has another cluster in TF_CONFIG.
        """
        host, _, port = self.addresses[index].rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER)
        except (OSError, OverflowError):
            return False
        with connection:
            try:
                greeting = connection.makefile("rb").readline(_LONGEST_GREETING)
            except TimeoutError:
                return True  # TensorFlow waits for the first word
            except OSError:
                return False
        if greeting.startswith(b"{") and greeting != self._greeting(index):
            raise ValueError(
                f"{self.describe(index)} has another cluster or index in {VARIABLE}, {greeting.decode().strip()}; give "
                "all workers the same addresses, and each its own index"
            )
        return bool(greeting)
