"""The server of `tf_repvgg.tflite.clean_process`: a program that forks one process for each object.

It runs by its path in a new Python. The `__init__` modules of this package are left out: they import TensorFlow, which
takes seconds. So the server imports only the modules of the objects and what those import.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]


class Server:
    """Answers the requests of one program.

    Args:
      control: Connection on which requests come as (method, arguments); the answer is (is_done, value or message).
    """

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._children: set[int] = set()

    def run(self) -> None:
        """Answers requests until the program closes the connection or ends; then kills all processes."""
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    method, arguments = self._control.recv()
                    self._control.send(self._answer(method, arguments))
        finally:
            for child in self._children:
                os.kill(child, signal.SIGKILL)

    def _answer(self, method, arguments):
        try:
            return True, getattr(self, method)(*arguments)
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"

    def fork(self, module: str, class_name: str) -> int:
        """Forks a process for an object of a class; the process gets the connection that follows the request.

        Returns:
          ID of the process.
        """
        connection = Connection(recv_handle(self._control))
        # Imported here and not in the process, so that the next process of this class has it at once.
        object_class = getattr(importlib.import_module(module), class_name)
        with connection:
            child = os.fork()
            if child == 0:
                self._control.close()
                _run_child(connection, object_class)
        self._children.add(child)
        return child

    def end(self, child: int) -> int | None:
        """Kills a process unless it has ended, and returns its exit code; minus the signal that ended it."""
        if child not in self._children:
            return None
        self._children.remove(child)
        os.kill(child, signal.SIGKILL)  # without effect on a process that has ended: it stays until it is waited for
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)


def _run_child(connection, object_class):
    """Serves an object in a forked process, which then ends without running what its parent has set up."""
    from tf_repvgg import native_output

    status = 1
    try:
        faulthandler.disable()  # the program that uses the object reports a crash, in one line
        with native_output.hide(), contextlib.suppress(EOFError, OSError):
            serve(connection, object_class)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(connection: Connection, object_class: Callable[..., Any]) -> None:
    """Makes an object at the first call of a method, and answers calls.

    Args:
      connection: Connection on which the arguments of the class come first, then calls as (method, arguments). The
        answer is (None, result), or after an error (name of its class, its message).
      object_class: Class of the object.

    Raises:
      EOFError: When the other end is closed.
    """
    arguments = connection.recv()
    instance = None
    while True:
        method, call_arguments = connection.recv()
        error_class = None
        try:
            if instance is None:
                instance = object_class(*arguments)
            value = getattr(instance, method)(*call_arguments)
        except Exception as error:
            error_class, value = type(error).__name__, str(error)
        connection.send((error_class, value))


def leave_out_inits(package: Path) -> None:
    """Makes the modules of a package importable without running its `__init__` modules."""
    for file in package.rglob("__init__.py"):
        name = ".".join(file.parent.relative_to(package.parent).parts)
        module = types.ModuleType(name)
        module.__path__ = [str(file.parent)]
        sys.modules[name] = module


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for the program, which ends the server
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, IDs of ended processes may become those of others
    control = Connection(int(sys.argv[1]))
    sys.path[:] = control.recv()
    leave_out_inits(_PACKAGE)
    Server(control).run()


if __name__ == "__main__":
    main()
