"""Objects in processes of their own that inherit nothing from this process.

A forked process inherits the Python objects of its parent, but not the threads that some of them own. Once Python's
garbage collector frees such an object, its destructor waits for a thread that does not exist there, and the process
crashes: TensorFlow's converter and the interpreters of LiteRT leave such objects behind. A new Python is safe, but
takes seconds to import TensorFlow for every process. Hence one server, started when it is first needed: it imports only
what the objects need, computes nothing, and forks a process for each object.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from types import TracebackType
from typing import Any

_SERVER_PROGRAM = Path(__file__).with_name("process_server.py")
_SECONDS_TO_END = 5


class ProcessEnded(RuntimeError):
    """The process of an object has crashed or ended.

    Args:
      exit_code: Exit code of the process, or minus the signal that ended it; None if it is unknown.
    """

    def __init__(self, exit_code: int | None) -> None:
        if exit_code is not None and exit_code < 0:
            super().__init__(f"crashed ({signal.Signals(-exit_code).name})")
        else:
            super().__init__("ended unexpectedly")


class RemoteError(RuntimeError):
    """A remote object has raised an error other than ValueError; its message is that of the error, on one line."""


class RemoteObject:
    """An object in a process of its own; a context manager that ends the process.

    The process makes the object when a method is called for the first time. It also ends when this process does.

    Args:
      object_class: Class of the object. It is imported by its name, without the `__init__` modules of `tf_repvgg`.
      *arguments: Arguments of the class, which are pickled.

    Attributes:
      process_id: ID of the process.

    Example:
      >>> import collections
      >>> from tf_repvgg.tflite.clean_process import RemoteObject
      >>> with RemoteObject(collections.Counter, "abca") as counter:
      ...     counter.call("most_common", 1)
      [('a', 2)]
    """

    def __init__(self, object_class: Callable[..., Any], *arguments: Any) -> None:
        self._connection, remote_end = multiprocessing.Pipe()
        with remote_end:
            self.process_id: int = _find_server().request(
                "fork", object_class.__module__, object_class.__qualname__, connection=remote_end
            )
        self._has_ended, self._exit_code = False, None
        with contextlib.suppress(OSError):  # a process that has died already is reported by the first call
            self._connection.send(arguments)

    def __enter__(self) -> "RemoteObject":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def call(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Calls a method of the object, and waits for its result.

        Args:
          method: Name of the method.
          *arguments: Arguments of the method, which are pickled.
          seconds: Longest time to wait; None to wait as long as it takes.

        Raises:
          ValueError: If the object raises it; with the same message, on one line.
          RemoteError: If the object raises another error.
          ProcessEnded: If the process crashes or ends.
          TimeoutError: If there is no result in time.
        """
        self.start_call(method, *arguments)
        return self.wait(seconds)

    def start_call(self, method: str, *arguments: Any) -> None:
        """Starts a call of a method; `wait` returns its result.

        Raises:
          ProcessEnded: If the process has ended.
        """
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise ProcessEnded(self.end()) from None

    def wait(self, seconds: float | None = None) -> Any:
        """Waits for the result of the call that was started, and raises as `call`."""
        try:
            is_ready = self._connection.poll(seconds)
            answer = self._connection.recv() if is_ready else None
        except (EOFError, OSError):
            raise ProcessEnded(self.end()) from None
        if answer is None:
            raise TimeoutError(f"no result within {seconds} s")
        error_class, value = answer
        if error_class is not None:
            message = " ".join(value.split()) or error_class
            raise ValueError(message) if error_class == "ValueError" else RemoteError(message)
        return value

    def end(self) -> int | None:
        """Kills the process unless it has ended, and returns its exit code; None if it is unknown."""
        if not self._has_ended:
            self._has_ended = True
            self._connection.close()
            with contextlib.suppress(RuntimeError):  # without a server it ends when it next reads the closed connection
                self._exit_code = _find_server().request("end", self.process_id)
        return self._exit_code


class _Server:
    """The server as this process sees it; see `tf_repvgg.tflite.process_server`."""

    def __init__(self):
        self._lock = threading.Lock()
        self._control, remote_end = multiprocessing.Pipe()
        with remote_end:
            descriptor = remote_end.fileno()
            # -P: the folder of the program is not for importing from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SERVER_PROGRAM), str(descriptor)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._control.send(sys.path)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def request(self, method: str, *arguments: Any, connection: Connection | None = None) -> Any:
        """Has the server run a method and returns the result; sends a connection along if one is given."""
        try:
            with self._lock:
                self._control.send((method, arguments))
                if connection is not None:
                    send_handle(self._control, connection.fileno(), self._process.pid)
                is_done, value = self._control.recv()
        except (EOFError, OSError):
            raise RuntimeError("the server of processes for LiteRT ended unexpectedly") from None
        if not is_done:
            raise RuntimeError(f"the server of processes for LiteRT failed ({value})")
        return value

    def end(self) -> None:
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)

    def disconnect(self) -> None:
        """Leaves the server to the process that has started it."""
        self._control.close()


_lock = threading.Lock()
_server: _Server | None = None


def _find_server() -> _Server:
    """The server of this process; starts it unless it is running."""
    global _server
    with _lock:
        if _server is None or not _server.is_running:
            _server = _Server()
        return _server


@atexit.register
def _end_server():
    if _server is not None:
        _server.end()


def _leave_server_to_parent():
    """A forked process starts a server of its own when it needs one."""
    global _lock, _server
    _lock = threading.Lock()
    if _server is not None:
        _server.disconnect()
        _server = None


os.register_at_fork(after_in_child=_leave_server_to_parent)
