"""Training steps of several models measured side by side, so that a busy machine slows all of them down alike."""

import gc
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

_MEMORY_STEPS = 5


def make_training_step(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """A function that runs one training step of a compiled model on one batch, and waits for its end.

    Unlike Keras's `train_on_batch`, which makes a dataset for every call and waits for the start of its tuning thread,
    150 or 310 ms.
    """
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    train = model.make_train_function()
    return lambda: float(train(batches)["loss"])


def measure_times(
    steps: Mapping[str, Callable[[], float]], rounds: int, title: str, steps_per_turn: int = 1
) -> dict[str, list[float]]:
    """Seconds per step of each model in each round, after a warm-up; the models take turns, in a rotating order.

    Args:
      steps: {name: function that runs one training step}.
      rounds: Number of turns of each model.
      title: Title of the progress bar.
      steps_per_turn: Steps in a turn: more than one if steps differ from each other.
    """
    for step in steps.values():
        step(), step()
    seconds = {name: [] for name in steps}
    names = list(steps)
    for turn in tqdm(range(rounds), desc=title, leave=False):
        for name in np.roll(names, turn):
            started = time.perf_counter()
            for _ in range(steps_per_turn):
                steps[name]()
            seconds[name].append((time.perf_counter() - started) / steps_per_turn)
    return seconds


def compare_times(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, tuple[float, ...]]:
    """{name: (median, lower and upper quartile)} of the ratios to the reference, round by round."""
    ratios = {name: np.divide(times, seconds[reference]) for name, times in seconds.items()}
    return {name: tuple(round(float(q), 4) for q in np.percentile(r, [50, 25, 75])) for name, r in ratios.items()}


def measure_peak_memory(case: str, processes: int = 5) -> float:
    """Peak resident MiB of this program started with --memory_of=<case>, which must call `print_peak_memory`.

    The median of several processes, which differ by some percent.
    """
    command = [sys.executable, sys.argv[0], f"--memory_of={case}"]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(processes)]
    return statistics.median(float(run.stdout) for run in runs)


def print_peak_memory(step: Callable[[], float], steps: int = _MEMORY_STEPS) -> None:
    """Runs training steps, and prints the peak resident MiB of this process."""
    gc.collect()  # models in reference cycles from which the step was made; when else they are freed is chance
    for _ in range(steps):
        step()
    print(_read_peak_kib() / 1024)


def _read_peak_kib():
    """The peak of this program alone: on Linux, getrusage counts the copy of the parent before exec too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    return int(peak)
