"""Runs export/benchmark.py on every file of a folder, one by one in this process; prints what each ended with, as JSON.

A crash by a signal, or whatever is no exit, ends this program itself.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

from absl import flags

from tf_repvgg.tflite import isolated


def outcome(main, path):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["benchmark", f"--files={path}", "--runs=10", "--warmup_runs=0"])
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main([])
        except SystemExit as exit_:
            status = exit_.code
    return {"file": path.name, "status": status, "stderr": errors.getvalue()}


def main():
    _, folder, seconds = sys.argv
    isolated.SECONDS = float(seconds)
    command = runpy.run_path("export/benchmark.py")
    print(json.dumps([outcome(command["main"], path) for path in sorted(Path(folder).iterdir())]))


if __name__ == "__main__":
    main()
