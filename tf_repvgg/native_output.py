"""Keeping native libraries quiet: TensorFlow's C++ writes to stderr before any log level applies."""

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def hidden():
    """Hides what is written to file descriptor 2 inside the block; shows it after all if the block raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(saved, captured.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
