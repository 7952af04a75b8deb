"""Start-up of the command lines beside that of TensorFlow alone: python benchmarks/startup.py

Every program starts in a new process; programs take turns, and times are ratios within one round. About two minutes.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import side_by_side
from absl import app, flags
from tabulate import tabulate

from tf_repvgg import provenance, storage

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 7, "Rounds in which every program starts once.", lower_bound=3)
flags.DEFINE_string("output", None, "JSON file to write, such as results/startup.json.")

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "import tensorflow"
PROGRAMS = {
    REFERENCE: ["-c", "import tensorflow"],
    "import tf_repvgg": ["-c", "import tf_repvgg"],
    "train/main.py --help": ["train/main.py", "--help"],
    "export/main.py --help": ["export/main.py", "--help"],
}


def start(arguments: list[str]) -> float:
    """Runs Python to its end. --help ends with exit status 1, by absl's convention."""
    # tf_repvgg has set variables that a user's environment does not have: they decide which Keras is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode != ("--help" in arguments):
        raise RuntimeError(f"{' '.join(arguments)} failed: {process.stderr}")
    return process.returncode


def main(_):
    starts = {name: functools.partial(start, arguments) for name, arguments in PROGRAMS.items()}
    seconds = side_by_side.measure_times(starts, FLAGS.rounds, "start-up")
    ratios = side_by_side.compare_times(seconds, REFERENCE)
    record = {
        "machine": provenance.machine(),
        "rounds": FLAGS.rounds,
        "programs": {
            name: {
                "startup_seconds_p50": round(float(np.median(seconds[name])), 2),
                "startup_over_tensorflow": ratios[name][0],
                "startup_over_tensorflow_quartiles": ratios[name][1:],
            }
            for name in PROGRAMS
        },
    }
    rows = [
        [name, f"{np.median(seconds[name]):.2f}", f"{median:.3f}", f"{lower:.3f} .. {upper:.3f}"]
        for name, (median, lower, upper) in ratios.items()
    ]
    headers = ["program", "seconds", "ratio", "quartiles"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    if FLAGS.output:
        storage.write_json(Path(FLAGS.output), record)


if __name__ == "__main__":
    app.run(main)
