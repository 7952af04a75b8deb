"""Writes that fail: at a write of a chosen number, a process finds the disk full or is killed.

A write is anything that a full disk can refuse, or a kill can come before: opening a file to write, making a folder, a
file that takes its place, and waiting until content is on the disk. What native code writes is not seen.
"""

import errno
import os
import signal
import sys

FULL, KILL = "full", "kill"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Writes:
    """Counts the writes of this process to a folder; audit hooks stay, so it is for a process that ends soon.

    Args:
      folder: Folder whose writes count, absolute.
      number: Number of the write that fails, from 1; 0 for none. A disk stays full from then on.
      ending: `FULL` or `KILL`.

    Attributes:
      count: Number of writes so far.
    """

    def __init__(self, folder: str, number: int = 0, ending: str = FULL) -> None:
        self.count = 0
        self._folder, self._number, self._ending = folder, number, ending
        self._fsync = os.fsync
        os.fsync = self._flush
        sys.addaudithook(self._see)

    def _see(self, event, arguments):
        is_write = event in ("os.mkdir", "os.rename") or (event == "open" and arguments[2] & _WRITING)
        if is_write and isinstance(arguments[0], str | os.PathLike):
            self._count(os.fspath(arguments[0]))

    def _flush(self, descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._count(os.readlink(f"/proc/self/fd/{number}"))
        self._fsync(descriptor)

    def _count(self, path):
        if not os.path.abspath(path).startswith(self._folder):
            return
        self.count += 1
        if self._number and self.count >= self._number:
            if self._ending == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
