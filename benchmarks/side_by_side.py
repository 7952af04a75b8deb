"""Training steps of several models measured side by side, so that a busy machine slows all of them alike."""

import gc
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

_MEMORY_STEPS = 5


def training_step(model, images, labels):
    """A function that runs one training step of a compiled model on one batch, and waits for its end.

    Not Keras's `train_on_batch`: that makes a dataset for every call and waits for its tuning thread to wake up, 150 or
    310 ms after the start.
    """
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    train = model.make_train_function()
    return lambda: float(train(batches)["loss"])


def times(steps, rounds, title, steps_per_turn=1):
    """{name: seconds per step of each round}, after a warm-up; the models take turns, in an order that turns too.

    Args:
      steps: {name: function that runs one training step}.
      rounds: turns of each.
      title: of the progress bar.
      steps_per_turn: more than one where not every step is the same.
    """
    for step in steps.values():
        step(), step()
    found = {name: [] for name in steps}
    names = list(steps)
    for turn in tqdm(range(rounds), desc=title, leave=False):
        for name in np.roll(names, turn):
            started = time.perf_counter()
            for _ in range(steps_per_turn):
                steps[name]()
            found[name].append((time.perf_counter() - started) / steps_per_turn)
    return found


def ratios(found, reference):
    """{name: (median, lower and upper quartile)} of the ratios to the reference, round by round."""
    of_rounds = {name: np.divide(seconds, found[reference]) for name, seconds in found.items()}
    return {name: tuple(round(float(q), 4) for q in np.percentile(r, [50, 25, 75])) for name, r in of_rounds.items()}


def peak_memory(words, processes=5):
    """Peak resident MiB of a process that runs this program with --memory_of=words, which calls `print_peak_memory`.

    The median of a few processes, as they differ by some percent.
    """
    command = [sys.executable, sys.argv[0], f"--memory_of={words}"]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(processes)]
    return statistics.median(float(run.stdout) for run in runs)


def print_peak_memory(step, steps=_MEMORY_STEPS):
    gc.collect()  # what step was made from: models in reference cycles, which would stay for as long as it happens
    for _ in range(steps):
        step()
    print(_peak_kib() / 1024)


def _peak_kib():
    """Of this program alone: getrusage's counts the copy of its parent that the process was before, on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    return int(peak)
