"""Files of unknown origin in LiteRT, each in a process of its own: one that crashes or hangs takes nothing with it."""

import contextlib
import faulthandler
import multiprocessing
import resource
import signal
import time
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from tf_repvgg import native_output
from tf_repvgg.tflite import interpreter, reader

SECONDS = 120
_BYTES_OF_MEMORY = 16 * 2**30


class Isolated:
    """A file loaded in LiteRT in a process of its own; a context manager, which ends it.

    Args:
      name: of the file, for messages.
      file: its bytes.
      threads: of the interpreter.

    Raises:
      ValueError: from every method, if the file cannot be read or run, or the process dies or takes too long.
    """

    def __init__(self, name: str, file: bytes, threads: int = 1):
        self._name = name
        # Forked, not spawned: a process that imports TensorFlow first would take seconds for each file.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, file, threads), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(1)
        self._process.kill()
        self._process.join()

    def costs(self) -> reader.Costs:
        """See `tf_repvgg.tflite.costs`."""
        return reader.Costs(*self._ask("costs"))

    def metadata(self, name: str) -> bytes | None:
        return self._ask("metadata", name)

    def times(self, runs: int) -> list[float]:
        """Milliseconds of single inferences on random input."""
        return self._ask("times", runs)

    def throughput(self, batch: int, runs: int) -> float:
        """Images per second in batches."""
        return self._ask("throughput", batch, runs)

    def predict(self, images) -> np.ndarray:
        """Outputs for every image, dequantized."""
        return self._ask("predict", images)

    def peak_memory_mib(self) -> float:
        """By how much the process grew from its start to its peak, in MiB."""
        return self._ask("peak_memory_mib")

    def _ask(self, *request):
        try:
            self._connection.send(request)
            if not self._connection.poll(SECONDS):
                raise ValueError(f"{self._name}: LiteRT did not answer within {SECONDS} s; the file may be damaged")
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(SECONDS)
            raise ValueError(f"{self._name}: LiteRT {_end(self._process.exitcode)}; the file may be damaged") from None
        if kind == "error":
            raise ValueError(f"{self._name}: {answer}")
        return answer


def interleaved_times(
    files: Mapping[str, Isolated], runs: int, warmup_runs: int = 20, runs_per_turn: int = 10
) -> dict[str, list[float]]:
    """{name: milliseconds of each timed inference}, the files taking turns in an order that turns too.

    A machine that slows down slows all of them alike.
    """
    for file in files.values():
        file.times(max(warmup_runs, 1))
    found = {name: [] for name in files}
    names = list(files)
    for turn in tqdm(range(-(-runs // runs_per_turn)), desc="latency", unit="turn", leave=False):
        for name in np.roll(names, turn):
            found[name] += files[name].times(min(runs_per_turn, runs - len(found[name])))
    return found


def _end(status):
    if status is not None and status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    return "ended unexpectedly"


class _Server:
    def __init__(self, file, threads):
        self._start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._file, self._threads = file, threads
        reader.operators(file)  # refuses what is no such file, before native code sees it
        self._interpreter = interpreter.load_interpreter(file, threads)
        self._fill(1)

    def _fill(self, batch):
        (details, *_) = self._interpreter.get_input_details()
        if batch != details["shape"][0]:
            self._interpreter.resize_tensor_input(details["index"], [batch, *details["shape"][1:]])
            self._interpreter.allocate_tensors()
        for end in self._interpreter.get_input_details():
            noise = np.random.default_rng(0).uniform(-1, 1, end["shape"]).astype(np.float32)
            self._interpreter.set_tensor(end["index"], interpreter.quantize_input(noise, end))

    def costs(self):
        return tuple(reader.costs(self._file))

    def metadata(self, name):
        return reader.metadata(self._file, name)

    def times(self, runs):
        found = []
        for _ in range(runs):
            started = time.perf_counter()
            self._interpreter.invoke()
            found.append(1000 * (time.perf_counter() - started))
        return found

    def throughput(self, batch, runs):
        self._fill(batch)
        milliseconds = self.times(runs + 1)[1:]
        self._fill(1)
        return 1000 * batch / float(np.median(milliseconds))

    def predict(self, images):
        return interpreter.predict(self._file, images)

    def peak_memory_mib(self):
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._start) / 1024


def _serve(connection, file, threads):
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES_OF_MEMORY, _BYTES_OF_MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.disable()  # whoever waits tells of a crash, in one line
    server = None
    with native_output.hide():
        while (request := connection.recv()) is not None:
            method, *arguments = request
            try:
                server = server or _Server(file, threads)
                connection.send(("answer", getattr(server, method)(*arguments)))
            except Exception as error:  # whatever a damaged file makes of LiteRT or of the schema's reader
                words = " ".join(str(error).split()) or type(error).__name__
                connection.send(("error", words if isinstance(error, ValueError) else f"it cannot be run: {words}"))
