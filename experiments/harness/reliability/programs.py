"""The programs under attack: how they are started, and the runs and exports that attacks interrupt.

Most programs are forked from a process that has imported TensorFlow, as in the tests, whose helpers start them.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from harness.commands import ROOT
from harness.reliability.fingerprints import describe_difference, take_fingerprint

sys.path.append(str(ROOT / "tests"))

from helpers.forked_programs import ForkedPrograms, Outcome

_TINY = ("--batch_size=256", "--deterministic", "--checkpoint_minutes=1e-9")
_TRAIN = ("train/main.py", "--flagfile=configs/digits_oabn.flags", *_TINY)
_FINE_TUNE = ("--epochs=1", "--init_from={prepared}/run", "--workdir={folder}/run", *_TINY)
_FLAGS_OF_LSQ = (
    *("--novalidation", "--crop_padding=1", "--quantize=lsq", "--weight_bits=4", "--learning_rate=0.001"),
    *("--warmup_epochs=0.2", "--weight_decay=0", "--freeze_epochs=0.5"),
)
_EXPORT = ("export/main.py", "--workdir={prepared}/run", "--output={folder}/export", "--calibration_images=64")


@dataclasses.dataclass(frozen=True)
class Work:
    """A command that is started again after each interruption, until it is done.

    Attributes:
      name: Name, a row of the page.
      command: Program and arguments; {folder} is a new folder, {prepared} one with the folder `run`.
    """

    name: str
    command: tuple[str, ...]

    def fill(self, folder: Path, prepared: Path) -> list[str]:
        """The command for two folders."""
        return [part.format(folder=folder, prepared=prepared) for part in self.command]


SHORT_TRAINING = Work("train, one epoch", (*_TRAIN, "--epochs=1", "--workdir={folder}/run"))
SHORT_EXPORT = Work("export, min_max", (*_EXPORT, "--ptq=min_max", "--weight_bits=8,4", "--latency_runs=0"))
WORKS = (
    Work("train", (*_TRAIN, "--epochs=2", "--workdir={folder}/run")),
    Work("ClusterQAT", ("train/main.py", "--flagfile=configs/digits_oabn_clusterqat.flags", *_FINE_TUNE)),
    Work("LSQ", ("train/main.py", *_FLAGS_OF_LSQ, *_FINE_TUNE)),
    Work(
        "export, adaquant", (*_EXPORT, "--ptq=adaquant", "--ptq_iterations=20", "--weight_bits=4,3", "--latency_runs=0")
    ),
    SHORT_EXPORT,
    Work("export with report", (*_EXPORT, "--weight_bits=8", "--latency_runs=50", "--report")),
    Work(
        "preparing data",
        (*_TRAIN, "--epochs=1", "--evaluate_only", "--workdir={prepared}/run", "--data_dir={folder}/data"),
    ),
    Work("results page", ("experiments/results_page.py", "--output={folder}/page")),
)


def start_process(command: Iterable[str], stderr: Path) -> subprocess.Popen:
    """Starts a program as a shell does, in a process of its own that imports everything."""
    with stderr.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=file,
            preexec_fn=_notice_interruptions,
        )


def _notice_interruptions():
    """Jobs of a shell in the background ignore SIGINT; programs in a terminal do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(process: subprocess.Popen, stderr: Path, seconds: float) -> Outcome:
    """Waits until a process has ended; one that does not end in time counts as ended by SIGALRM."""
    started = time.monotonic()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = -signal.SIGALRM
    return Outcome(status, "", stderr.read_text(errors="replace"), time.monotonic() - started)


def renew_folder(path: Path) -> Path:
    """Makes an empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


class Arena:
    """The folder of the experiment, with a process that programs are forked from.

    Args:
      path: Folder to work in; everything is written there.

    Attributes:
      path: That folder.
      prepared: Folder with `run`, a finished run on the digits.
      programs: Process that programs are forked from.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        # TFDS prepares the digits there; programs inherit the variable.
        os.environ["TFDS_DATA_DIR"] = str(path / "data")
        self.programs = ForkedPrograms(renew_folder(path / "output"))
        self.prepared = self._prepare()

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.programs.__exit__(kind, error, trace)

    def complete(self, work: Work, folder: Path) -> Outcome:
        """Runs a work until it ends by itself.

        Raises:
          RuntimeError: If it fails.
        """
        outcome = self.programs.run(*work.fill(folder, self.prepared), watch=str(folder))
        if outcome.status:
            raise RuntimeError(f"{work.name} ended with status {outcome.status}: {outcome.stderr[-1000:]}")
        return outcome

    def find_loss(self, work: Work, folder: Path, expected: dict[str, str]) -> str:
        """Completes a work, and says what it has lost by what happened before; empty if nothing.

        Args:
          work: Work that was interrupted.
          folder: Folder of it.
          expected: Fingerprint of an uninterrupted run.
        """
        outcome = self.programs.run(*work.fill(folder, self.prepared))
        if outcome.status:
            return f"started again, it ended with status {outcome.status}: {outcome.stderr[-200:]}"
        difference = describe_difference(take_fingerprint(folder), expected)
        return f"other content than that of an uninterrupted run: {difference}" if difference else ""

    def _prepare(self):
        prepared = self.path / "prepared"
        command = (*_TRAIN, "--epochs=1", f"--workdir={prepared}/run")
        outcome = self.programs.run(*command)
        if outcome.status:
            raise RuntimeError(f"preparing a run failed: {outcome.stderr[-1000:]}")
        return prepared
