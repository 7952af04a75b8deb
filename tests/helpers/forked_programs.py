"""Programs run as a user runs them, in processes that need not import TensorFlow again: see preloaded.py."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_SERVER = Path(__file__).with_name("preloaded.py")
_ROOT = _SERVER.parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      status: Exit status; -N after signal N.
      stdout: What it printed.
      stderr: What it printed there.
      seconds: Time that it took.
      touches: Number of files in the folder of `watch` that it opened, made, renamed or removed; None if it was killed.
      writes: Number of its writes to that folder; see write_faults.py.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    touches: int | None = None
    writes: int | None = None


class ForkedPrograms:
    """A process that has imported TensorFlow and forks for each program, one after the other.

    Args:
      folder: Existing folder for what programs print.
    """

    def __init__(self, folder: str | Path) -> None:
        self._output = Path(folder) / "program"
        self._server = subprocess.Popen(
            [sys.executable, _SERVER], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "ForkedPrograms":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, *command: object, **options: Any) -> Outcome:
        """Runs one program: run("train/main.py", "--epochs=1", ...).

        Args:
          *command: Program, relative to the repository or absolute, and its arguments.
          **options: Options of preloaded.py.
        """
        started = time.monotonic()
        status = self._request(command=[str(argument) for argument in command], output=str(self._output), **options)
        seconds = time.monotonic() - started
        counts = self._output.with_suffix(".counts")
        return Outcome(
            status=status,
            stdout=self._output.with_suffix(".out").read_text(errors="replace"),
            stderr=self._output.with_suffix(".err").read_text(errors="replace"),
            seconds=seconds,
            **(json.loads(counts.read_text()) if counts.exists() else {}),
        )

    def start(self, output: Path, *command: object, **options: Any) -> int:
        """Starts a program that runs beside others, and returns the ID of its process.

        Args:
          output: Start of the paths of what it prints; .out and .err follow.
          *command: Program and its arguments, as for `run`.
          **options: Options of preloaded.py.
        """
        arguments = [str(argument) for argument in command]
        return self._request(command=arguments, output=str(output), background=True, **options)

    def wait(self, process: int) -> int:
        """Waits for a program that `start` has started, and returns its exit status; -N after signal N."""
        return self._request(wait=process)

    def _request(self, **request):
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())
