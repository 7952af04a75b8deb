"""Runs many command lines with one import of TensorFlow: a process that has imported everything forks for each.

python preloaded.py CASES.json: a list of {"command": [program, flag, ...], "output": path}; for each, stdout and
stderr go to output + ".out" and ".err", and the exit status to output + ".status". What a user would see, at a tenth
of the time: each child runs the program as __main__ from the start and exits by itself.
"""

import json
import os
import runpy
import sys
import traceback


def run(command, output):
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
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

    with open(sys.argv[1], encoding="utf-8") as file:
        cases = json.load(file)
    for case in cases:
        if (child := os.fork()) == 0:
            run(**case)
        _, status = os.waitpid(child, 0)
        with open(case["output"] + ".status", "w", encoding="utf-8") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
