"""What the command lines share: quiet logs, and errors of one line: bad input exit status 2, failed work 1 or 3."""

import contextlib
import functools
import os
import signal
import sys

import tensorflow as tf
from absl import app, flags, logging

FAILED, BAD_INPUT, DIVERGED = 1, 2, 3
INTERRUPTED = 128 + signal.SIGINT  # as shells report it


def run(main):
    """Runs an absl program whose malformed flags end it with one line and exit status 2.

    So does what may fail on the way, such as a full disk, with exit status 1, weights that are no longer finite with 3,
    and Control-C with 130.
    """
    logging.set_verbosity(logging.ERROR)  # TFDS tells of every file it opens, and warns of those it does not find.
    app.run(functools.partial(_run, main), flags_parser=_parse_flags)


def _run(main, argv):
    try:
        main(argv)
    except KeyboardInterrupt:
        _exit("interrupted; what was written before is whole", INTERRUPTED)
    except FloatingPointError as error:
        _exit(error, DIVERGED)
    except OSError as error:
        _exit(error, FAILED)
    except tf.errors.ResourceExhaustedError as error:  # memory, or the disk that TensorBoard's events go to
        _exit(error.message.splitlines()[0].rpartition("}} ")[2], FAILED)


def _parse_flags(argv):
    try:
        program, *words = flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        _exit(error)
    if words:
        _exit(f"{words[0]!r} is no flag; flags are written --name=value, switches --name or --noname")
    return [program]


def key_flags() -> dict[str, str]:
    """The program's own flags and their values, as they would be written on the command line.

    Without --data_dir: reports are for other machines too.
    """
    own = flags.FLAGS.get_key_flags_for_module("__main__")
    return {
        flag.name: flag.serialize().partition("=")[2]
        for flag in own
        if flag.value is not None and flag.name != "data_dir"
    }


@contextlib.contextmanager
def bad_input_exits():
    """Around everything that reads what the user gave: its errors become one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        _exit(error)


def _exit(error, status=BAD_INPUT):
    print(f"{os.path.relpath(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
