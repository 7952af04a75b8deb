"""What the command lines share: quiet logs, and bad input that gives one line and exit status 2."""

import contextlib
import os
import sys

from absl import app, flags, logging

BAD_INPUT = 2


def run(main):
    """Runs an absl program whose malformed flags end it with one line and exit status 2."""
    logging.set_verbosity(logging.ERROR)  # TFDS tells of every file it opens, and warns of those it does not find.
    app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv):
    try:
        program, *words = flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        _exit(error)
    if words:
        _exit(f"{words[0]!r} is no flag; flags are written --name=value, switches --name or --noname")
    return [program]


def key_flags() -> dict[str, str]:
    """The program's own flags and their values, as they would be written on the command line."""
    own = flags.FLAGS.get_key_flags_for_module("__main__")
    return {flag.name: flag.serialize().partition("=")[2] for flag in own if flag.value is not None}


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
