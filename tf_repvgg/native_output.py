"""Keeping native libraries quiet: TensorFlow's C++ code writes to stderr before any log level applies."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def capture() -> Iterator[Callable[[], str]]:
    """Captures what is written to file descriptor 2 inside the block; shows it after all if the block raises.

    Yields:
      Function without arguments that returns the text captured so far.

    Example:
      >>> import os
      >>> from tf_repvgg import native_output
      >>> with native_output.capture() as read_output:
      ...     _ = os.write(2, b"a warning from C++")
      >>> read_output()
      'a warning from C++'
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with _open_file() as file:
        os.dup2(file.fileno(), 2)
        text = ""

        def read_output():
            nonlocal text
            if not file.closed:
                file.seek(0)
                text = file.read().decode(errors="replace")
            return text

        try:
            yield read_output
        except BaseException:
            os.write(stderr, read_output().encode())
            raise
        finally:
            read_output()
            os.dup2(stderr, 2)
            os.close(stderr)


def _open_file():
    """A file in memory if the system has such files: importing the package should need no writable folder."""
    return open(os.memfd_create("stderr"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


@contextlib.contextmanager
def hide() -> Iterator[None]:
    """Hides what is written to file descriptor 2 inside the block; shows it after all if the block raises.

    Example:
      >>> import os
      >>> from tf_repvgg import native_output
      >>> with native_output.capture() as read_output:
      ...     with native_output.hide():
      ...         _ = os.write(2, b"a warning from C++")
      >>> read_output()
      ''
    """
    with capture():
        yield
