"""Files and folders: written whole or not at all, claimed by one process, and kept results of long work."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import tensorflow as tf

_LOCK_NAME = ".lock"
_PARTIAL = ".partial"

# Open lock files by folder: a lock lasts until its process ends, however that ends.
_claims = {}


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` that takes its place when the block ends without an error.

    The block writes a file there, or makes a folder of files. They are on the disk before they take their place, so
    that not even a power cut leaves half of them under their name. What a killed process leaves is a folder
    `.<name>.partial`; the next to write `path`, or to claim its folder, removes it.

    Raises:
      OSError: names `path` and why it cannot be written; what was there before is intact.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}{_PARTIAL}")
    temporary = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            _flush_to_disk(written)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    except (OSError, tf.errors.OpError) as error:
        raise OSError(f"cannot write {str(path)!r} ({_reason(error)}); what was written before is intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error):
    if isinstance(error, OSError):
        return error.strerror or error
    # "{{node ...}} path; reason [Op:...]", and more lines
    return error.message.partition("\n")[0].rpartition("; ")[2].partition(" [Op:")[0]


def _flush_to_disk(path):
    """Waits until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder):
    """Removes what a killed process was writing to a folder; only for the one process that writes there."""
    for leftover in Path(folder).glob(f".*{_PARTIAL}"):
        shutil.rmtree(leftover)


def write_json(path, content):
    """Writes JSON so that the file is whole or absent."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_bytes(path, content):
    """Writes bytes so that the file is whole or absent."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def append_line(path, line):
    """Adds one line to a text file, and waits until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_writable_folder(path) -> Path:
    """Makes a folder if need be.

    Raises:
      NotADirectoryError: if `path` is a file.
      PermissionError: if nothing can be written there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file; give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise PermissionError(f"{str(path)!r} cannot be written to ({error.strerror})") from None
    return path


def claim_folder(path) -> Path:
    """Makes a folder if need be, and keeps other processes out of it for as long as this one lives.

    Raises:
      BlockingIOError: if another process has claimed it; names that process.
      NotADirectoryError: if `path` is a file.
      PermissionError: if nothing can be written there.
    """
    path = make_writable_folder(path)
    if path.resolve() in _claims:
        return path
    file = open(path / _LOCK_NAME, "a+", encoding="ascii")  # noqa: SIM115  (open is what keeps the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            process = file.read().strip()
        raise BlockingIOError(
            f"{str(path)!r} is in use by process {process}; wait until it has ended, or use another folder"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _claims[path.resolve()] = file
    remove_partial_files(path)
    return path


def lock_holder(folder) -> str | None:
    """The process, by its id, that has claimed a folder and still lives; None if there is none."""
    try:
        with open(Path(folder) / _LOCK_NAME, encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
    except FileNotFoundError:
        pass
    return None


class Unfinished:
    """Files that took long to make, kept until all that belong together are done, for the command that is run again.

    Each lies under the hash of everything that it depends on, so that one that was made otherwise is never taken for
    it, and is there whole or not at all.

    Args:
      folder: claimed folder of the command's output; they are in ".unfinished" there.
      depends_on: JSON-serializable; what all of them depend on.
    """

    def __init__(self, folder, **depends_on):
        self._folder = Path(folder) / ".unfinished"
        self._depends_on = depends_on

    def read(self, **step) -> tuple[dict, bytes] | None:
        """(facts, file) as `keep` was given them for this step."""
        path = self._path(step)
        if not path.exists():
            return None
        return json.loads((path / "facts.json").read_text(encoding="utf-8")), (path / "file").read_bytes()

    def keep(self, facts: dict, file: bytes, **step):
        """Raises OSError as `written_whole`."""
        self._folder.mkdir(exist_ok=True)
        with atomic_write(self._path(step)) as temporary:
            temporary.mkdir()
            (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            (temporary / "file").write_bytes(file)

    def remove(self):
        """All of them: the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step):
        content = json.dumps(self._depends_on | step, sort_keys=True).encode()
        return self._folder / hashlib.sha256(content).hexdigest()[:32]
