"""A folder for the temporary files of a program, so that a killed program leaves no litter behind."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tf_repvgg import storage

_PREFIX = "tf_repvgg-program-"
# Between making its folder and claiming it, a program needs microseconds.
_SECONDS_TO_CLAIM = 2


@contextlib.contextmanager
def use_own_folder() -> Iterator[Path]:
    """A context in which this process makes its temporary files in a folder of its own, which is removed at the end.

    TensorFlow writes each function that AutoGraph converts to a temporary file. It removes these files when a program
    ends by itself, but not when it is killed. The folders of killed programs are removed here, by the next one.

    Yields:
      The folder, inside TMPDIR or where Python makes temporary files without it.

    Raises:
      PermissionError: If nothing can be written there.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import temporary_files
      >>> with temporary_files.use_own_folder() as folder:
      ...     print(tempfile.gettempdir() == str(folder))
      True
      >>> folder.exists()
      False
    """
    # Where TMPDIR is of no use, Python falls back on other folders in silence; they may be too small.
    parent = os.environ.get("TMPDIR") or _find_default()
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise PermissionError(_explain(parent, error)) from None
    default = tempfile.tempdir
    try:
        storage.claim_folder(folder)
        _remove_abandoned_folders(folder.parent)
        tempfile.tempdir = str(folder)
        yield folder
    finally:
        tempfile.tempdir = default
        shutil.rmtree(folder, ignore_errors=True)


def _find_default():
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise PermissionError(_explain("/tmp", error)) from None


def _explain(folder, error):
    return (
        f"temporary files cannot be written to {folder!r} ({error.strerror}); "
        "set the environment variable TMPDIR to a folder where they can"
    )


def _remove_abandoned_folders(parent):
    """Removes the folders of this user's programs that have ended without doing so."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another program may remove it at the same time
            status = folder.lstat()
            is_claimed_soon = time.time() - status.st_mtime < _SECONDS_TO_CLAIM
            if status.st_uid == os.geteuid() and not is_claimed_soon and storage.lock_holder(folder) is None:
                shutil.rmtree(folder)
