"""Regular files of bounded size: no reader waits for a pipe, reads a device without end, or writes through a link."""

import hashlib
import io
import os
import stat
from pathlib import Path

# A description of a run, and a line of its log, have a few kB.
MAX_RECORD_BYTES = 64 * 2**20
# Files of TFLite address their content with 32 bits.
MAX_INTEGER_FILE_BYTES = 2**32
MAX_MODEL_BYTES = 16 * 2**30

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def open_to_read(path: str | Path, largest: int = MAX_RECORD_BYTES) -> io.BufferedReader:
    """Opens a file; links to it are followed.

    Args:
      path: File to read.
      largest: Largest size of the file in bytes.

    Returns:
      The file, open for reading.

    Raises:
      OSError: If the file is missing, cannot be opened, is a folder, a pipe or a device, or is larger than `largest`;
        names it.

    Example:
      >>> import os
      >>> from tf_repvgg import regular_files
      >>> try:
      ...     regular_files.open_to_read(os.devnull)
      ... except OSError as error:
      ...     print(error)
      '/dev/null' is a device; a regular file is expected
    """
    file = open(_open(path, os.O_RDONLY), "rb")  # noqa: SIM115  (the caller closes it)
    if (size := os.fstat(file.fileno()).st_size) > largest:
        file.close()
        raise OSError(f"{str(path)!r} has {size:,} bytes; at most {largest:,} are read")
    return file


def read_bytes(path: str | Path, largest: int = MAX_RECORD_BYTES) -> bytes:
    """Reads a whole file; see `open_to_read`.

    Raises:
      OSError: If the file is missing, cannot be read, or is not a regular file of at most that size; names it.
    """
    with open_to_read(path, largest) as file:
        content = file.read(largest + 1)
    if len(content) > largest:  # a file may grow, and those in /proc have no size
        raise OSError(f"{str(path)!r} has more than the {largest:,} bytes that are read")
    return content


def read_text(path: str | Path, largest: int = MAX_RECORD_BYTES) -> str:
    """Reads a file of text in UTF-8; see `open_to_read`.

    Raises:
      OSError: If the file is missing, cannot be read, or is not a regular file of at most that size; names it.
      ValueError: If the file is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is damaged: byte {error.start} is not UTF-8") from None


def hash_file(path: str | Path, largest: int = MAX_MODEL_BYTES) -> str:
    """The SHA-256 of a file, in hexadecimal digits; see `open_to_read`.

    Raises:
      OSError: If the file is missing, cannot be read, or is not a regular file of at most that size; names it.
    """
    with open_to_read(path, largest) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_write(path: str | Path, flags: int) -> int:
    """Opens a file, or makes it, but never through a link: the file that a link points to may be precious.

    Args:
      path: File to write.
      flags: Flags of `os.open`, such as `os.O_APPEND`, beside those for writing and making the file.

    Returns:
      Descriptor of the file, open for reading and writing.

    Raises:
      OSError: If the file cannot be opened, is a link or a second name of a file, or is a folder, a pipe or a device;
        names it.
    """
    if os.path.islink(path):
        raise OSError(f"{str(path)!r} is a link, and nothing is written through links; remove it")
    descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is a second name of another file, which would change too; remove it")
    return descriptor


def check_no_link(folder: str | Path) -> None:
    """Checks that a folder in a run or an export is not a link: files behind it may belong to others.

    Raises:
      OSError: If it is a link; names it.
    """
    if os.path.islink(folder):
        raise OSError(f"{str(folder)!r} is a link, and nothing is written through links; remove it, or name its target")


def _open(path, flags):
    # Without O_NONBLOCK, a pipe without a writer would be waited for.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise OSError(f"{str(path)!r} is {kind}; a regular file is expected")
    return descriptor
