"""Faults at every write: the disk is full, or the process killed, and the same command completes afterwards."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.reliability.fingerprints import take_fingerprint
from harness.reliability.programs import Arena, Work, renew_folder
from harness.reliability.verdicts import ACCEPTED, LOST, REFUSED, Verdict, judge

# A program that finds the disk full has read its flags before, or not.
_STATUSES_OF_FULL_DISKS = (1, 2)
_FIRST_DISK_KIBIBYTES, _LAST_DISK_KIBIBYTES = 4, 2**16


class WritePoints:
    """Lets one write after the other of a work fail.

    Args:
      arena: Where programs run.
      work: Work whose writes fail.
    """

    def __init__(self, arena: Arena, work: Work) -> None:
        self._arena, self._work = arena, work
        folder = renew_folder(arena.path / "uninterrupted")
        self.count = arena.complete(work, folder).writes or 0
        self._expected = take_fingerprint(folder)

    def fail(self, number: int) -> list[Verdict]:
        """Runs the work on a disk that is full from a write on, kills it there, and completes it.

        Returns:
          A verdict on the full disk, and one on the kill.
        """
        folder = renew_folder(self._arena.path / "interrupted")
        verdicts = []
        for ending in ("full", "kill"):
            attack = f"{ending} at write {number} of {self.count}"
            fault = {"number": number, "ending": ending}
            command = self._work.fill(folder, self._arena.prepared)
            outcome = self._arena.programs.run(*command, watch=str(folder), fault=fault)
            kind = f"{'disk full' if ending == 'full' else 'killed'} at a write: {self._work.name}"
            if ending == "kill" and outcome.status == -signal.SIGKILL:
                verdicts.append(Verdict(kind, ACCEPTED, attack))
            else:
                verdicts.append(judge(kind, outcome, attack, _STATUSES_OF_FULL_DISKS))
        return self._complete(folder, verdicts)

    def fill_disks(self, number: int) -> list[Verdict]:
        """Runs the work on disks of several sizes, from some kilobytes on, and completes it on a large one.

        Args:
          number: Number of sizes. Disks that the work fits on are left out.

        Returns:
          A verdict for each size; none if this machine does not let the experiment mount disks.
        """
        ratio = (_LAST_DISK_KIBIBYTES / _FIRST_DISK_KIBIBYTES) ** (1 / number)
        verdicts: list[Verdict] = []
        for step in range(number):
            size = round(_FIRST_DISK_KIBIBYTES * ratio**step)
            with _mount(self._arena.path / "disk", size) as disk:
                if disk is None:
                    return []
                outcome = self._arena.programs.run(*self._work.fill(disk, self._arena.prepared))
                if not outcome.status:
                    return verdicts
                attack = f"disk of {size} KiB"
                verdict = judge(f"small disk: {self._work.name}", outcome, attack, _STATUSES_OF_FULL_DISKS)
                _resize(disk, _LAST_DISK_KIBIBYTES)
                verdicts += self._complete(disk, [verdict])
        return verdicts

    def _complete(self, folder, verdicts):
        """The verdicts, of which those that are no faults become faults if the work does not complete as it should."""
        detail = self._arena.find_loss(self._work, folder, self._expected)
        if not detail:
            return verdicts
        return [
            Verdict(verdict.kind, LOST, verdict.attack, detail) if verdict.outcome in (ACCEPTED, REFUSED) else verdict
            for verdict in verdicts
        ]


@contextmanager
def _mount(folder: Path, kibibytes: int) -> Iterator[Path | None]:
    """A file system of some size in memory; None if this machine does not allow it."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _resize(folder, kibibytes):
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", folder], check=True)
