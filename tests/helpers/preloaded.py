"""Runs many command lines with one import of TensorFlow: a process that has imported everything forks for each.

Reads a line of JSON for each, {"command": [program, flag, ...], "output": path}, and answers with a line that holds the
exit status; stdout and stderr go to output + ".out" and ".err". What a user would see, at a tenth of the time: each
child runs the program as __main__ from the start and exits by itself. Forking is safe as long as this process has run
no operation of TensorFlow: only that starts its threads, which a child would not inherit.

With "kill": {"folder": path, "event": number, "seconds": delay} the child dies by SIGKILL that long after its Python
code has touched files in a folder so many times (opened, made, renamed, removed): always at the same place of the
program, and with a delay also within what TensorFlow's native code writes.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback

SECONDS = 400  # no program here takes a tenth of it
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_after(folder, event, seconds):
    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    events = 0

    def count(name, arguments):
        nonlocal events
        if name in TOUCHES and str(arguments[0]).startswith(folder):
            events += 1
            if events == event:
                threading.Thread(target=kill).start() if seconds else kill()

    sys.addaudithook(count)


def run(command, output, kill=None):
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    signal.alarm(SECONDS)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    if kill:
        die_after(**kill)
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    import tensorflow_datasets  # noqa: F401

    import tf_repvgg.data
    import tf_repvgg.fusion
    import tf_repvgg.models
    import tf_repvgg.tflite
    import tf_repvgg.training.callbacks  # noqa: F401

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
