"""Files and folders: written whole or not at all, claimed by one process, and kept results of long work."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import tensorflow as tf

_LOCK_NAME = ".lock"
_PARTIAL = ".partial"
_CONTENT_SHA256 = "content_sha256"

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
        shutil.rmtree(folder, ignore_errors=True)
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
        shutil.rmtree(path)


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
    """Appends a line to a text file, and waits until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
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
    file = open(path / _LOCK_NAME, "a+", encoding="ascii")  # noqa: SIM115  (the lock lasts while the file is open)
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


def lock_holder(folder: str | Path) -> str | None:
    """The ID of the running process that has claimed a folder; None if there is none."""
    try:
        with open(Path(folder) / _LOCK_NAME, encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
    except FileNotFoundError:
        pass
    return None


class FinishedWork:
    """Results of long work, kept so that the same command, started again, continues where it ended.

    A result is a JSON file that also holds the inputs on which the result depends. `find` returns only results whose
    inputs are those given, and only whole ones. A result may have a binary file beside it.

    Args:
      folder: Folder of the results; made when the first result is kept.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import storage
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     work = storage.FinishedWork(folder)
      ...     _ = work.keep("adaround", inputs={"bits": 4}, result={"images": 360})
      ...     print(work.find("adaround", {"bits": 4}), work.find("adaround", {"bits": 3}))
      {'bits': 4, 'images': 360} None
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def find(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Looks up a result.

        Args:
          name: Name of the result; slashes in it make subfolders.
          inputs: Everything that the result depends on, JSON-serializable.

        Returns:
          The inputs and the result as one dictionary; None if nothing is kept under that name, or with other inputs.
        """
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        # Compared as JSON keeps them: there tuples are lists.
        if not json.loads(json.dumps(dict(inputs))).items() <= record.items():
            return None
        if (expected := record.get(_CONTENT_SHA256)) and self._content_sha256(name) != expected:
            return None
        return record

    def read_content(self, name: str) -> bytes:
        """The binary file of a result that `find` has returned."""
        return self._content_path(name).read_bytes()

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
        if content is not None:
            # First, so that no result is found without its file.
            write_bytes(self._content_path(name), content)
            record[_CONTENT_SHA256] = hashlib.sha256(content).hexdigest()
        write_json(path, record)
        return record

    def remove(self) -> None:
        """Removes all results, once the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _content_path(self, name):
        return self._folder / f"{name}.bin"

    def _content_sha256(self, name):
        path = self._content_path(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
