"""Files of unknown origin in LiteRT, each in a process of its own: a crash or a hang stays in that process."""

import re
import resource
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from tf_repvgg import converter_errors, memory
from tf_repvgg.tflite import complexity, interpreter, reader, timing
from tf_repvgg.tflite.clean_process import ProcessEnded, RemoteError, RemoteObject

SECONDS = 120
_LARGEST_MEMORY = 16 * 2**30


# Python, and the C++ library, without memory.
_OUT_OF_MEMORY = re.compile("MemoryError|bad_alloc|Cannot allocate memory|failed to allocate", re.IGNORECASE)


class Throughput(NamedTuple):
    """Speed of a file on batches.

    Attributes:
      images_per_second: Images per second, from the median time of a batch.
      batch: Images in a batch.

    Example:
      >>> from tf_repvgg.tflite.isolated import Throughput
      >>> Throughput(images_per_second=250.0, batch=8).batch
      8
    """

    images_per_second: float
    batch: int


class Isolated:
    """A file that LiteRT runs in a process of its own; a context manager that ends the process.

    Args:
      name: Name of the file in messages.
      file: Content of the file.
      threads: Number of interpreter threads.

    Attributes:
      process_id: ID of the process.

    Raises:
      ValueError: From every method, if the file cannot be read or run, or the process crashes or takes too long.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> from tf_repvgg.tflite.isolated import Isolated
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> file = tflite.convert(model, calibration=np.ones([1, 8, 8, 3]))
      >>> with Isolated("conv.tflite", file) as isolated:
      ...     isolated.costs().macs, isolated.predict(np.ones([2, 8, 8, 3], np.float32)).shape
      (3888, (2, 6, 6, 4))
      >>> with Isolated("labels.txt", b"cat dog bird") as isolated:
      ...     try:
      ...         isolated.costs()
      ...     except ValueError as error:
      ...         print(error)
      labels.txt: not a TFLite file: it should have b'TFL3' at byte 4, but has b'dog '
    """

    def __init__(self, name: str, file: bytes, threads: int = 1) -> None:
        self._name = name
        self._process = RemoteObject(_LoadedFile, file, threads)

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.end()

    @property
    def process_id(self) -> int:
        return self._process.process_id

    def costs(self) -> complexity.Costs:
        """The costs of the file; see `tf_repvgg.tflite.costs`."""
        return self._call("costs")

    def metadata(self, name: str) -> bytes | None:
        """A metadata block of the file; see `tf_repvgg.tflite.metadata`."""
        return self._call("metadata", name)

    def batch(self) -> int:
        """Images of one inference: the first size of the file's input; 1 if it is open."""
        return self._call("batch")

    def times(self, runs: int) -> list[float]:
        """Times single inferences on random input.

        Args:
          runs: Number of inferences.

        Returns:
          Milliseconds of each inference.
        """
        return self._call("times", runs)

    def throughput(self, batch: int, runs: int) -> Throughput:
        """Times inferences on batches of random input.

        A file of batch 1 is resized to the batch, if it can be; any other file computes its own.

        Args:
          batch: Images in a batch.
          runs: Number of inferences.
        """
        return self._call("throughput", batch, runs)

    def predict(self, images: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        """The outputs for images; see `tf_repvgg.tflite.predict`."""
        return self._call("predict", images)

    def peak_memory_mib(self) -> float:
        """Growth of the process from its start to its peak so far, in MiB."""
        return self._call("peak_memory_mib")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._process.call(method, *arguments, seconds=SECONDS)
        except TimeoutError:
            reason = f"LiteRT did not answer within {SECONDS} s; the file may be damaged"
        except ProcessEnded as error:
            reason = f"LiteRT {error}; the file may be damaged, or need more memory than {_describe_limit()}"
        except RemoteError as error:
            reason = converter_errors.explain_run(str(error))
            if _OUT_OF_MEMORY.search(str(error)):
                reason = f"it needs more memory than {_describe_limit()}"
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"{self._name}: {reason}")


def time_by_turns(
    files: Mapping[str, Isolated], runs: int, warmup_runs: int = 20, runs_per_turn: int = 10
) -> dict[str, list[float]]:
    """Times files by turns, so that a machine that slows down slows all of them alike.

    Args:
      files: {name: file}.
      runs: Number of timed inferences of each file.
      warmup_runs: Number of inferences of each file before the first turn.
      runs_per_turn: Number of inferences of a file in one turn.

    Returns:
      {name: milliseconds of each timed inference}.
    """
    for file in files.values():
        file.times(max(warmup_runs, 1))
    times: dict[str, list[float]] = {name: [] for name in files}
    names = list(files)
    for turn in tqdm(range(-(-runs // runs_per_turn)), desc="latency", unit="turn", leave=False):
        for name in np.roll(names, turn):
            times[name] += files[name].times(min(runs_per_turn, runs - len(times[name])))
    return times


def memory_limit() -> int:
    """Bytes of address space that a file may use: the memory of the machine, 16 GiB, or the limit of this process."""
    return min(memory.limit(), _LARGEST_MEMORY)


def _describe_limit():
    return f"the {memory_limit() / 2**30:.1f} GiB that this process may use (the machine's memory, or ulimit -v)"


class _LoadedFile:
    """The file in its own process, where LiteRT has loaded it."""

    def __init__(self, file, threads):
        limit = memory_limit()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self._memory_at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._file = file
        reader.operators(file)  # refuses bytes that are not a TFLite file, before native code reads them
        self._threads = threads
        self._load()
        timing.check_sizes(self._interpreter)
        self._batch = timing.batch_of(self._interpreter)

    def _load(self):
        self._interpreter = None  # frees the memory of the last one before the next takes its own
        self._interpreter = interpreter.load_interpreter(self._file, self._threads)
        timing.fill_inputs(self._interpreter)

    def costs(self):
        return complexity.costs(self._file)

    def metadata(self, name):
        return reader.metadata(self._file, name)

    def batch(self):
        return self._batch

    def times(self, runs):
        return timing.measure_times(self._interpreter, runs)

    def throughput(self, batch, runs):
        is_resized = self._batch == 1 and timing.resize_batch(self._interpreter, batch)
        if not is_resized:
            batch = self._batch
            self._load()
        milliseconds = timing.measure_times(self._interpreter, runs + 1)[1:]
        if is_resized:
            self._load()
        return Throughput(1000 * batch / float(np.median(milliseconds)), batch)

    def predict(self, images):
        return interpreter.predict(self._file, images)

    def peak_memory_mib(self):
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._memory_at_start) / 1024
