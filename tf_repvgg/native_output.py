"""Keeping native libraries quiet: TensorFlow's C++ writes to stderr before any log level applies."""

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def capture():
    """Keeps what is written to file descriptor 2 inside the block; shows it after all if the block raises.

    Yields:
      A function that returns it so far, as text.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        text = []

        def read():
            if not file.closed:
                file.seek(0)
                text[:] = [file.read().decode(errors="replace")]
            return text[0]

        try:
            yield read
        except BaseException:
            os.write(saved, read().encode())
            raise
        finally:
            read()
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def hide():
    """Hides what is written to file descriptor 2 inside the block; shows it after all if the block raises."""
    with capture():
        yield
