"""Runs many command lines with one import of TensorFlow: this process imports everything once and forks for each.

Each command is one line of JSON on stdin, {"command": [program, flag, ...], "output": path}. The answer is one line on
stdout with the exit status; the program's stdout and stderr go to output + ".out" and output + ".err". A user would see
the same, in ten times the time: each child runs the program as __main__ from the start and exits by itself. Forking is
safe as long as this process runs no TensorFlow operation: the first one starts threads, which a child does not inherit.

With "import_from": folder, the program imports modules from that folder instead of its own.

With "kill": {"folder": path, "event": number, "seconds": delay}, the child kills itself with SIGKILL that long after
its Python code has touched files in a folder that many times (opened, made, renamed, removed). So it dies at the same
place of the program every time, and with a delay also while TensorFlow's native code writes.
"""

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback

TIMEOUT_SECONDS = 400  # ten times what the slowest program takes
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


def run(command, output, import_from=None, kill=None):
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    signal.alarm(TIMEOUT_SECONDS)
    sys.argv = command
    sys.path.insert(0, import_from or os.path.dirname(command[0]))
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


def convert_layers():
    """Leaves AutoGraph's conversions of layers, loss and metric to all children. In a graph, no operation runs.

    Children would spend a sixth of their time on these.
    """
    import tensorflow as tf

    from tf_repvgg.layers import RepVGGBlock
    from tf_repvgg.training import optimization

    with tf.Graph().as_default():
        RepVGGBlock(4, strides=2, norm="oabn")(tf.zeros([1, 8, 8, 4]), training=True)
        RepVGGBlock(4, norm="oabn")(tf.zeros([1, 8, 8, 4]), training=True)
        for function in (optimization.CrossEntropy(4), optimization.make_top1()):
            function(tf.zeros([1], tf.int64), tf.zeros([1, 4]))


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

    convert_layers()
    gc.collect()
    gc.freeze()  # children need not look through what is imported
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
