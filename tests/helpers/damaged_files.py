"""Runs export/benchmark.py on every file of a folder, one after the other in this process; prints the results as JSON.

A crash or an exception that is not an exit ends this program too.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

from absl import flags

from tf_repvgg.tflite import isolated


def benchmark_file(main, path):
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
    benchmark = runpy.run_path("export/benchmark.py")["main"]
    print(json.dumps([benchmark_file(benchmark, path) for path in sorted(Path(folder).iterdir())]))


if __name__ == "__main__":
    main()
