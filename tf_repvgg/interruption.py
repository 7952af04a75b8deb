"""Control-C and SIGTERM in the programs: one line instead of a traceback, and in training a checkpoint first.

The library itself leaves signals alone. Until a program handles errors (while it imports, which takes seconds, and
reads its flags) and once it has done its work, a signal ends it at once. In between it raises an exception, which
training puts off until a step is complete.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_PROGRAM_FOLDERS = ("train", "export", "experiments", "benchmarks")

_may_defer = False
_is_deferred = False
_received: int | None = None
_stderr = 2


class Terminated(BaseException):
    """SIGTERM has asked the program to end."""


def status_of(number: int) -> int:
    """The exit status of a program that a signal has ended, as shells report it.

    Example:
      >>> import signal
      >>> from tf_repvgg import interruption
      >>> interruption.status_of(signal.SIGINT)
      130
    """
    return 128 + number


def describe(number: int) -> str:
    """The message of a program that a signal has ended.

    Example:
      >>> import signal
      >>> from tf_repvgg import interruption
      >>> interruption.describe(signal.SIGTERM)
      'terminated; files written earlier are intact'
    """
    return f"{_SIGNALS[signal.Signals(number)]}; files written earlier are intact"


def is_in_program() -> bool:
    """Whether this is the main thread of one of the programs in the repository.

    Example:
      >>> from tf_repvgg import interruption
      >>> interruption.is_in_program()
      False
    """
    folder = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve().parent
    is_program = folder.name in _PROGRAM_FOLDERS and folder.parent == Path(__file__).resolve().parents[1]
    return is_program and threading.current_thread() is threading.main_thread()


def end_at_signals() -> None:
    """Lets signals end this process at once, with a line on what is stderr now."""
    global _stderr
    if _stderr == 2:
        _stderr = os.dup(2)  # what native code writes to descriptor 2 is hidden during imports
    _handle_signals(_end)


@contextlib.contextmanager
def raise_signals() -> Iterator[None]:
    """A context in which signals raise `KeyboardInterrupt` and `Terminated`; after it, they end the process at once.

    Where native code calls Python, it may put an error of its own in the place of theirs; so any error but `OSError`
    after a signal counts as the signal's.
    """
    global _received
    _received = None
    end_at_signals()
    _handle_signals(_raise)
    sys.unraisablehook = _end_if_interrupted
    try:
        yield
    except OSError:  # such as a full disk, while a checkpoint is written
        raise
    except Exception:
        if is_requested():
            raise_received()
        raise
    finally:
        end_at_signals()


def renew_handlers() -> None:
    """Takes signals back from native code with a handler of its own, which TensorFlow's clusters have for SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def allow_deferral() -> Iterator[None]:
    """A context in which `defer_signals` has an effect; a deferred signal raises at its end at the latest."""
    global _may_defer, _is_deferred
    _may_defer = True
    try:
        yield
    finally:
        _may_defer = _is_deferred = False
    if is_requested():
        raise_received()


def defer_signals() -> None:
    """Lets the next signal only set what `is_requested` returns, until `allow_deferral` ends. The one after it raises.

    For work whose progress would be lost: before its first step, a signal need not wait.
    """
    global _is_deferred
    _is_deferred = _may_defer


def is_requested() -> bool:
    """Whether a signal has asked the program to end.

    Example:
      >>> from tf_repvgg import interruption
      >>> interruption.is_requested()
      False
    """
    return _received is not None


def request_end() -> None:
    """Does as if SIGTERM had been received and deferred: another process of the same training has received a signal."""
    global _received
    if _received is None:
        _received = signal.SIGTERM


def raise_received() -> None:
    """Raises the exception of the signal that was deferred.

    Raises:
      KeyboardInterrupt: After SIGINT.
      Terminated: After SIGTERM.
    """
    raise KeyboardInterrupt if _received == signal.SIGINT else Terminated


def _handle_signals(handler):
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as the shell sets it for a job in the background
            signal.signal(number, handler)


def _raise(number, frame):
    global _received
    is_first, _received = _received is None, number
    if not (_is_deferred and is_first):
        raise_received()


def _end(number, frame):
    """Ends without clean-up, which may take long or fail half-way; every file is whole or absent in any case."""
    os.write(_stderr, f"{os.path.relpath(sys.argv[0])}: error: {describe(number)}\n".encode())
    os._exit(status_of(number))


def _end_if_interrupted(unraisable):
    """Python ignores what is raised in a destructor; an interruption must not get lost there."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
        _end(_received, None)
    sys.__unraisablehook__(unraisable)
