"""What the command lines share: quiet logs, and bad input that gives one line and exit status 2."""

import contextlib
import os
import sys

from absl import app, flags, logging

BAD_INPUT = 2


def run(main):
    """Runs an absl program whose malformed flags end it with one line and exit status 2."""
    logging.set_verbosity(logging.WARNING)  # TFDS tells every file it opens.
    app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        _exit(error)


@contextlib.contextmanager
def bad_input_exits():
    """Around everything that reads what the user gave: its errors become one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        _exit(error)


def _exit(error):
    print(f"{os.path.relpath(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
