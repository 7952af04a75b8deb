"""What the command lines share: their flags, quiet logs, and errors as one line with an exit status."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

import tensorflow as tf
from absl import app, flags, logging

from tf_repvgg import runs

FAILED, BAD_INPUT, DIVERGED = 1, 2, 3
INTERRUPTED = 128 + signal.SIGINT  # as shells report it


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Parses the flags of an absl program, runs it and exits.

    A program that fails prints one line. Its exit status is 1 after failures such as a full disk, 2 after malformed
    flags, 3 if training has diverged, and 130 after Control-C.

    Args:
      main: Function that takes the command line without its flags.
    """
    logging.set_verbosity(logging.ERROR)  # TFDS logs every file that it opens, and warns of those that it misses.
    app.run(functools.partial(_run, main), flags_parser=_parse_flags)


def _run(main, argv):
    try:
        main(argv)
    except KeyboardInterrupt:
        _exit("interrupted; files written earlier are intact", INTERRUPTED)
    except FloatingPointError as error:
        _exit(error, DIVERGED)
    except OSError as error:
        _exit(error, FAILED)
    except tf.errors.ResourceExhaustedError as error:  # memory, or the disk of TensorBoard's events
        _exit(error.message.splitlines()[0].rpartition("}} ")[2], FAILED)


def _parse_flags(argv):
    try:
        program, *arguments = flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        _exit(error)
    if arguments:
        _exit(f"{arguments[0]!r} is not a flag; write flags as --name=value, and switches as --name or --noname")
    return [program]


def key_flags(program: str, flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, str]:
    """The flags of a program and their values, as text.

    Flags without a value are left out. So is --data_dir, which differs between machines.

    Args:
      program: Module that defines or adopts the flags: the program's `__name__`.
      flag_values: Parsed flags.

    Example:
      >>> from absl import flags
      >>> from tf_repvgg import cli
      >>> values = flags.FlagValues()
      >>> _ = flags.DEFINE_integer("epochs", 10, "Passes over the data.", flag_values=values, module_name="program")
      >>> _ = values(["program", "--epochs=3"])
      >>> cli.key_flags("program", values)
      {'epochs': '3'}
    """
    lines = _lines_of_flags(program, ("data_dir",), flag_values)
    return {flag.name: line.partition("=")[2] for flag, line in lines}


def read_settings(
    program: str, leave_out: Collection[str] = (), flag_values: flags.FlagValues = flags.FLAGS
) -> dict[str, runs.Setting]:
    """The flags of a program as the settings of a `tf_repvgg.runs.Run`. Flags without a value are left out.

    Args:
      program: Module that defines or adopts the flags: the program's `__name__`.
      leave_out: Names of flags that do not belong to the run, such as its folder.
      flag_values: Parsed flags.

    Example:
      >>> from absl import flags
      >>> from tf_repvgg import cli
      >>> values = flags.FlagValues()
      >>> _ = flags.DEFINE_boolean("flip", True, "Mirror images.", flag_values=values, module_name="program")
      >>> _ = values(["program", "--noflip"])
      >>> cli.read_settings("program", flag_values=values)
      {'flip': Setting(line='--noflip', is_default=False)}
    """
    return {
        flag.name: runs.Setting(line, is_default=flag.value == flag.default)
        for flag, line in _lines_of_flags(program, leave_out, flag_values)
    }


def _lines_of_flags(program, leave_out, flag_values):
    return [
        (flag, flag.serialize())
        for flag in flag_values.get_key_flags_for_module(program)
        if flag.value is not None and flag.name not in leave_out
    ]


@contextlib.contextmanager
def bad_input_exits() -> Iterator[None]:
    """A context for reading input from the user: its errors become one line and exit status 2.

    Example:
      >>> from tf_repvgg import cli
      >>> try:
      ...     with cli.bad_input_exits():
      ...         raise ValueError("--epochs is 0; give 1 or more")
      ... except SystemExit as error:
      ...     print(error.code)
      2
    """
    try:
        yield
    except (ValueError, OSError) as error:
        _exit(error)


def _exit(error: object, status: int = BAD_INPUT) -> NoReturn:
    print(f"{os.path.relpath(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
