"""Workers of train/main.py that train together on this machine, bounded in time."""

import json
import os
import socket
import time

_SECONDS = 120


def find_free_ports(count):
    """Ports that nothing on this machine listens on."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def make_config(ports, index):
    """TF_CONFIG of a worker."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


class Workers:
    """Workers that have been started.

    Args:
      programs: `ForkedPrograms` that start them.
      folder: Folder for what they print.
      commands: Flags of each worker.
      configs: TF_CONFIG of each worker; by default one cluster on free ports.
    """

    def __init__(self, programs, folder, commands, configs=None):
        ports = find_free_ports(len(commands))
        configs = configs or [make_config(ports, index) for index in range(len(commands))]
        folder.mkdir(exist_ok=True)
        self._programs = programs
        self._outputs = [folder / f"worker{index}" for index in range(len(commands))]
        self._processes = [
            programs.start(
                output,
                "train/main.py",
                "--strategy=multi_worker",
                *command,
                environment={"TF_CONFIG": config},
                seconds=_SECONDS,
            )
            for output, command, config in zip(self._outputs, commands, configs, strict=True)
        ]

    def signal_at(self, path, number, index):
        """Sends a signal to a worker as soon as a file or folder exists."""
        end = time.monotonic() + _SECONDS
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(self._processes[index], number)

    def wait(self):
        """Waits until all have ended: the exit status of each, and its lines on stderr."""
        statuses = [self._programs.wait(process) for process in self._processes]
        errors = [output.with_suffix(".err").read_text(errors="replace").splitlines() for output in self._outputs]
        return statuses, errors
