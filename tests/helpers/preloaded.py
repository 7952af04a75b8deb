"""Runs many command lines with one import of TensorFlow: this process imports everything once and forks for each.

Each command is one line of JSON on stdin, {"command": [program, flag, ...], "output": path}. The answer is one line on
stdout with the exit status; the program's stdout and stderr go to output + ".out" and output + ".err". A user would see
the same, in ten times the time: each child runs the program as __main__ from the start and exits by itself. Forking is
safe as long as this process runs no TensorFlow operation: the first one starts threads, which a child does not inherit.

With "import_from": folder, the program imports modules from that folder instead of its own. It runs in the folder
"cwd", a signal ends it after "seconds", and it has "memory" bytes of addresses.

With "kill": {"folder": path, "event": number, "seconds": delay, "number": signal}, the child sends itself a signal,
SIGKILL by default, that long after its Python code has touched files in a folder that many times (opened, made,
renamed, removed). So it dies at the same place of the program every time, and with a delay also while TensorFlow's
native code writes. Without a folder, the delay counts from its start.

With "environment": {name: value}, it has further environment variables. With "background": true, the answer is the ID
of its process, without waiting for its end; {"wait": process ID} waits for that.

With "watch": folder, the numbers of touches and of writes go to output + ".counts". With "fault": {"number": number,
"ending": "full" or "kill"} beside it, a write to that folder fails: see write_faults.py.
"""

import gc
import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback

TIMEOUT_SECONDS = 400  # ten times what the slowest program takes
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def count_touches(folder, act=lambda events: None):
    """A list of one number, which counts the touches of a folder; `act` is called with it at each."""
    counter = [0]

    def count(name, arguments):
        if name in TOUCHES and str(arguments[0]).startswith(folder):
            counter[0] += 1
            act(counter[0])

    sys.addaudithook(count)
    return counter


def signal_after(folder=None, event=1, seconds=0, number=signal.SIGKILL):
    def send():
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    def start():
        threading.Thread(target=send, daemon=True).start() if seconds else send()

    if number != signal.SIGKILL:
        from tf_repvgg import interruption

        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        interruption.end_at_signals()  # as the import of tf_repvgg does in programs
    if folder is None:
        start()
    else:
        count_touches(folder, lambda events: start() if events == event else None)


def run(
    command,
    output,
    import_from=None,
    cwd=None,
    environment=None,
    seconds=TIMEOUT_SECONDS,
    memory=None,
    kill=None,
    watch=None,
    fault=None,
):
    os.environ.update(environment or {})
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    signal.alarm(seconds)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.argv = [os.path.abspath(command[0]), *command[1:]] if cwd else command
    sys.path.insert(0, import_from or os.path.dirname(sys.argv[0]))
    if cwd:
        os.chdir(cwd)
    if kill:
        signal_after(**kill)
    if watch:
        from write_faults import Writes  # beside this file

        touches, writes = count_touches(watch), Writes(watch, **(fault or {}))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if watch:
        with open(output + ".counts", "w") as file:
            json.dump({"touches": touches[0], "writes": writes.count}, file)
    os._exit(status)


def main():
    import tensorflow_datasets  # noqa: F401

    import tf_repvgg.data
    import tf_repvgg.fusion
    import tf_repvgg.models
    import tf_repvgg.quantization.ptq
    import tf_repvgg.quantization.qat
    import tf_repvgg.tflite
    import tf_repvgg.training.checkpoints
    import tf_repvgg.training.logs  # noqa: F401

    gc.collect()
    gc.freeze()  # children need not look through what is imported
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        is_in_background = request.pop("background", False)
        counts = request["output"] + ".counts"
        if os.path.exists(counts):
            os.remove(counts)
        if (child := os.fork()) == 0:
            run(**request)
        if is_in_background:
            print(child, flush=True)
            continue
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
