"""What the command lines share: their flags, quiet logs, and errors as one line with an exit status."""

import contextlib
import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tensorflow as tf
from absl import app, flags, logging

from tf_repvgg import interruption, regular_files, runs, temporary_files

FAILED, BAD_INPUT, DIVERGED = 1, 2, 3

# Beyond these, numbers overflow somewhere in TensorFlow; a flag with an upper bound of its own has that one.
_LARGEST_INTEGER = 2**31 - 1
_LARGEST_FLOAT = 1e30
_LONGEST_CHAIN_OF_FLAGFILES = 10

# The flag counts as that of the program's module that calls `define_trust_flag`.
flags.disclaim_key_flags()


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Parses the flags of an absl program, runs it and exits.

    A program that fails prints one line. Its exit status is 1 after failures such as a full disk, 2 after malformed
    flags, 3 if training has diverged, 130 after Control-C, and 143 after SIGTERM.

    Args:
      main: Function that takes the command line without its flags.
    """
    logging.set_verbosity(logging.ERROR)  # TFDS logs every file that it opens, and warns of those that it misses.
    app.run(functools.partial(_run, main), flags_parser=_parse_flags)


def define_trust_flag(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --trust_model, which programs pass on to `runs.load_model`.

    Args:
      flag_values: Where to define it.

    Example:
      >>> from absl import flags
      >>> from tf_repvgg import cli
      >>> values = flags.FlagValues()
      >>> cli.define_trust_flag(values)
      >>> values(["program", "--trust_model"]) and values.trust_model
      True
    """
    flags.DEFINE_boolean(
        "trust_model",
        False,
        "Let model files of Keras 2 run code: layers of your own, Lambda layers, SavedModels. Whoever made such a file "
        "can run any program on this computer.",
        flag_values=flag_values,
    )


def _run(main, argv):
    try:
        with interruption.raise_signals(), contextlib.ExitStack() as stack:
            with bad_input_exits():
                stack.enter_context(temporary_files.use_own_folder())
            main(argv)
    except (KeyboardInterrupt, interruption.Terminated) as error:
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        _exit(interruption.describe(number), interruption.status_of(number))
    except FloatingPointError as error:
        _exit(error, DIVERGED)
    except OSError as error:
        _exit(error, FAILED)
    except tf.errors.ResourceExhaustedError as error:  # memory, or the disk of TensorBoard's events
        _exit(error.message.splitlines()[0].rpartition("}} ")[2], FAILED)


def _parse_flags(argv):
    try:
        _check_flagfiles(argv)
        program, *arguments = flags.FLAGS(argv)
        check_values(flags.FLAGS)
    except (flags.Error, OSError, ValueError) as error:
        _exit(error)
    if arguments:
        _exit(f"{arguments[0]!r} is not a flag; write flags as --name=value, and switches as --name or --noname")
    return [program]


def _check_flagfiles(arguments, chain=()):
    """Checks the files of --flagfile, which absl would read however long they are; a file may name others."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            continue
        path = str(Path(value if equals else following).expanduser())
        if len(chain) >= _LONGEST_CHAIN_OF_FLAGFILES:
            raise ValueError(
                f"flagfile {chain[0]!r} leads to a chain of more than {_LONGEST_CHAIN_OF_FLAGFILES} flagfiles"
            )
        if path not in chain:  # absl leaves out a file that it is reading
            lines = (line.strip() for line in regular_files.read_text(path).splitlines())
            _check_flagfiles(list(lines), (*chain, path))


def check_values(flag_values: flags.FlagValues) -> None:
    """Checks what the types of absl's flags leave open: numbers are finite and not too large, and text is not empty.

    Args:
      flag_values: Parsed flags.

    Raises:
      ValueError: If a flag that was given has another value; names the flag.

    Example:
      >>> from absl import flags
      >>> from tf_repvgg import cli
      >>> values = flags.FlagValues()
      >>> _ = flags.DEFINE_float("learning_rate", 0.1, "", lower_bound=0, flag_values=values)
      >>> _ = values(["program", "--learning_rate=nan"])
      >>> try:
      ...     cli.check_values(values)
      ... except ValueError as error:
      ...     print(error)
      --learning_rate is nan; give a finite number
    """
    for name in flag_values:
        flag = flag_values[name]
        if flag.present:
            _check_value(name, flag)


def _check_value(name, flag):
    value = flag.value
    if value == "":  # from an unset variable of the shell, perhaps
        raise ValueError(f"--{name} is empty; give a value, or leave the flag out")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ValueError(f"--{name} is {value}; give a finite number")
    upper_bound = getattr(flag.parser, "upper_bound", None)
    largest = _LARGEST_INTEGER if isinstance(value, int) else _LARGEST_FLOAT
    if upper_bound is None and abs(value) > largest:
        raise ValueError(f"--{name} is {value}; give a number up to {largest:.10g}")


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
        if isinstance(error, ValueError) and interruption.is_requested():
            raise  # native code's error in place of the signal's; `interruption.raise_signals` knows
        _exit(error)


def _exit(error: object, status: int = BAD_INPUT) -> NoReturn:
    print(f"{os.path.relpath(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)
