"""Files and folders: written whole or not at all, claimed by one process, and kept results of long work."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import tensorflow as tf

from tf_repvgg import json_records, regular_files

_LOCK_NAME = ".lock"
_PARTIAL = ".partial"
_CONTENT_SHA256 = "content_sha256"
_LONGEST_PROCESS_ID = 20

# Open lock files by folder: a lock lasts until its process ends, however that ends.
_claims: dict[Path, TextIO] = {}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block ends without an error.

    The block writes a file there, or makes a folder of files. They are on the disk before they take their place, so
    that not even a power cut leaves a part of them under their name. A killed process leaves a folder
    `.<name>.partial`, which the next process that writes `path`, or claims its folder, removes.

    Args:
      path: File or folder to write. Its parent folder must exist.

    Yields:
      Temporary path to write to; it does not exist yet.

    Raises:
      OSError: If the file cannot be written; names `path` and the reason. An earlier file of that name is unchanged.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "labels.txt")
      ...     with storage.atomic_write(path) as temporary:
      ...         _ = temporary.write_text("cat dog")
      ...         print(path.exists())
      ...     print(path.read_text())
      False
      cat dog
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}{_PARTIAL}")
    temporary = folder / path.name
    try:
        _remove(folder)
        folder.mkdir()
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            _flush_to_disk(file)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    except (OSError, tf.errors.OpError) as error:
        raise OSError(f"cannot write {str(path)!r} ({_reason(error)}); files written earlier are intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(path):
    """Removes a file, a folder or a link, if there is one; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def remove_partial_files(folder: str | Path) -> None:
    """Removes what a killed process was writing to a folder; only for the one process that writes there."""
    for path in Path(folder).glob(f".*{_PARTIAL}"):
        _remove(path)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON so that the file is whole or absent.

    Raises:
      OSError: If the file cannot be written.
      TypeError: If the content is not JSON-serializable.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "result.json")
      ...     storage.write_json(path, {"images": 360})
      ...     print(path.read_text())
      {
        "images": 360
      }
      <BLANKLINE>
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes bytes so that the file is whole or absent.

    Raises:
      OSError: If the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.tflite")
      ...     storage.write_bytes(path, b"TFL3")
      ...     print(path.stat().st_size)
      4
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def append_line(path: str | Path, line: str) -> None:
    """Appends a line to a text file, and waits until it is on the disk.

    Raises:
      OSError: If the file cannot be written, or is a link or no regular file.
    """
    with open(regular_files.open_to_write(path, os.O_APPEND), "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_writable_folder(path: str | Path) -> Path:
    """Makes a folder unless it exists.

    Returns:
      The path of the folder.

    Raises:
      NotADirectoryError: If `path` is a file.
      PermissionError: If nothing can be written there.
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


def claim_folder(path: str | Path) -> Path:
    """Makes a folder unless it exists, and keeps other processes out of it until this process ends.

    Returns:
      The path of the folder.

    Raises:
      BlockingIOError: If another process has claimed the folder; names that process.
      NotADirectoryError: If `path` is a file.
      PermissionError: If nothing can be written there.
      OSError: If `.lock` in it is not a file that this function has made.

    Example:
      >>> import os, tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = storage.claim_folder(os.path.join(folder, "export"))
      ...     print(path.name, os.listdir(path))
      export ['.lock']
    """
    path = make_writable_folder(path)
    if path.resolve() in _claims:
        return path
    descriptor = regular_files.open_to_write(path / _LOCK_NAME, 0)
    file = open(descriptor, "r+", encoding="utf-8", errors="replace")  # noqa: SIM115  (the lock lasts while it is open)
    process = _read_process_id(file, path / _LOCK_NAME)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"{str(path)!r} is in use by process {process}; wait until it has ended, or use another folder"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    _claims[path.resolve()] = file
    remove_partial_files(path)
    return path


def check_no_folders(paths: Iterable[str | Path]) -> None:
    """Checks, before long work, that no folder is where a file will be written.

    Raises:
      IsADirectoryError: If one is; names it.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     storage.check_no_folders([f"{folder}/export.json"])
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder, but a file will be written there; remove the folder")


@contextlib.contextmanager
def wait_for_lock(path: str | Path) -> Iterator[None]:
    """A context that one process at a time is in; the others wait.

    Args:
      path: File of the lock; made, with its folder, unless it exists.

    Raises:
      OSError: If the file cannot be made, or is a link or no regular file.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder, storage.wait_for_lock(f"{folder}/.digits.lock"):
      ...     print(pathlib.Path(folder, ".digits.lock").exists())
      True
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = regular_files.open_to_write(path, 0)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_holder(folder: str | Path) -> str | None:
    """The ID of the running process that has claimed a folder; None if there is none."""
    path = Path(folder) / _LOCK_NAME
    try:
        with regular_files.open_to_read(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read_process_id(file, path)
    except FileNotFoundError:
        pass
    return None


def _read_process_id(file, path):
    """The ID in a lock file, empty in a new one; another content is somebody's, under a second name of that file."""
    content = file.read(_LONGEST_PROCESS_ID + 1)
    text = content.decode(errors="replace") if isinstance(content, bytes) else content
    if not re.fullmatch(r"(\d{1,20}\n?)?", text):
        raise OSError(f"{str(path)!r} should hold the ID of a process, but holds something else; remove it")
    return text.strip()


class FinishedWork:
    """Results of long work, kept so that the same command, started again, continues where it ended.

    A result is a JSON file that also holds the inputs on which the result depends. `find` returns only results whose
    inputs are those given, and only whole ones. A result may have a binary file beside it.

    Args:
      folder: Folder of the results; made when the first result is kept.
      is_sealed: Whether each result holds a checksum of itself, so that `find` returns no result that was changed.
        Results that people read, and may correct, go without.

    Raises:
      NotADirectoryError: If the folder is a link or no folder.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     work = storage.FinishedWork(folder)
      ...     _ = work.keep("adaround", inputs={"bits": 4}, result={"images": 360})
      ...     print(work.find("adaround", {"bits": 4}), work.find("adaround", {"bits": 3}))
      {'bits': 4, 'images': 360} None
    """

    def __init__(self, folder: str | Path, is_sealed: bool = False) -> None:
        self._folder = Path(folder)
        self._is_sealed = is_sealed
        if self._folder.is_symlink() or (self._folder.exists() and not self._folder.is_dir()):
            raise NotADirectoryError(f"{str(self._folder)!r} is a link or no folder; results are kept there: remove it")

    def find(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Looks up a result.

        Args:
          name: Name of the result; slashes in it make subfolders.
          inputs: Everything that the result depends on, JSON-serializable.

        Returns:
          The inputs and the result as one dictionary; None if nothing is kept under that name, or with other inputs,
          or what is kept is damaged.
        """
        try:
            record = json_records.read(self._folder / f"{name}.json", dict[str, Any])
            if self._is_sealed and not json_records.is_whole(record):
                return None
            record = json_records.unseal(record)
            # Compared as JSON keeps them: there tuples are lists.
            if not json.loads(json.dumps(dict(inputs))).items() <= record.items():
                return None
            if expected := record.get(_CONTENT_SHA256):
                is_whole = hashlib.sha256(self.read_content(name)).hexdigest() == expected
                return record if is_whole else None
            return record
        except (OSError, ValueError):
            return None

    def read_content(self, name: str) -> bytes:
        """The binary file of a result that `find` has returned."""
        return regular_files.read_bytes(self._content_path(name), regular_files.MAX_INTEGER_FILE_BYTES)

    def keep(
        self, name: str, inputs: Mapping[str, Any], result: Mapping[str, Any], content: bytes | None = None
    ) -> dict[str, Any]:
        """Keeps a result.

        Args:
          name: Name of the result; slashes in it make subfolders.
          inputs: Everything that the result depends on, JSON-serializable.
          result: The result, JSON-serializable.
          content: Binary file that belongs to the result; None for none.

        Returns:
          The dictionary that `find` will return.

        Raises:
          OSError: If a file cannot be written.
        """
        record = {**inputs, **result}
        path = self._folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        for damaged in (path, self._content_path(name)):
            if damaged.is_dir():
                _remove(damaged)
        if content is not None:
            # First, so that no result is found without its file.
            write_bytes(self._content_path(name), content)
            record[_CONTENT_SHA256] = hashlib.sha256(content).hexdigest()
        write_json(path, json_records.seal(record) if self._is_sealed else record)
        return record

    def remove(self) -> None:
        """Removes all results, once the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _content_path(self, name):
        return self._folder / f"{name}.bin"
