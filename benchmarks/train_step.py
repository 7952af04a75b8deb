"""Cost of a training step: BN, OABN and QARepVGG side by side: python benchmarks/train_step.py

Times are ratios to plain BN within this run: the models take turns, and the ratio of each round counts, so that a
busy machine slows all of them alike. Peak memory comes from one process per model.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import runs
from tf_repvgg.models import build_repvgg, complexity
from tf_repvgg.training import optimization

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 30, "Rounds in which every model takes its turn.", lower_bound=3)
flags.DEFINE_string("output", None, "JSON file to write, such as results/train_step.json.")
flags.DEFINE_string("memory_of", None, "Internal: CASE/MODEL whose peak memory this process measures.")

CASES = {
    "CIFAR model, 32x32, batch 128": ("cifar-s", (32, 32, 3), 10, 128),
    "RepVGG-A0, 224x224, batch 8": ("A0", (224, 224, 3), 1000, 8),
}
MODELS = {"BN": {}, "OABN": {"norm": "oabn"}, "QARepVGG": {"block": "qarepvgg"}}
_MEMORY_STEPS = 5


def make_trainer(case, name):
    """(model, a function that runs one training step on random data)."""
    variant, shape, classes, batch_size = CASES[case]
    model = build_repvgg(variant, shape, classes, **MODELS[name])
    optimizer = optimization.make_optimizer(0.01, steps=10_000, warmup_steps=1, weight_decay=1e-3)
    model.compile(optimizer, optimization.CrossEntropy(classes))
    generator = np.random.default_rng(0)
    images = generator.standard_normal([batch_size, *shape]).astype(np.float32)
    labels = generator.integers(0, classes, batch_size)
    return model, lambda: model.train_on_batch(images, labels)


def measure_times(case):
    """{model: seconds of each round}, after a warm-up, the order turning from round to round."""
    steps = {name: make_trainer(case, name)[1] for name in MODELS}
    for step in steps.values():
        step(), step()
    times = {name: [] for name in MODELS}
    names = list(MODELS)
    for turn in tqdm(range(FLAGS.rounds), desc=case, leave=False):
        for name in np.roll(names, turn):
            started = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - started)
    return times


def measure_peak_memory(case, name):
    """Peak resident MiB of a process that trains this model for a few steps."""
    command = [sys.executable, __file__, f"--memory_of={case}/{name}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(case, name):
    _, step = make_trainer(case, name)
    for _ in range(_MEMORY_STEPS):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(case):
    variant, shape, classes, _ = CASES[case]
    times = measure_times(case)
    memory = {name: measure_peak_memory(case, name) for name in tqdm(MODELS, desc=f"{case}: memory", leave=False)}
    rows = {}
    for name, options in MODELS.items():
        counts = complexity(build_repvgg(variant, shape, classes, **options))
        ratios = np.divide(times[name], times["BN"])
        rows[name] = {
            "step_ms_p50": round(1000 * float(np.median(times[name])), 2),
            "step_time_over_bn": round(float(np.median(ratios)), 4),
            "step_time_over_bn_quartiles": [round(float(value), 4) for value in np.percentile(ratios, [25, 75])],
            "peak_memory_mib": round(memory[name], 1),
            "peak_memory_over_bn": round(memory[name] / memory["BN"], 4),
            "training_parameters": counts.training_parameters,
            "training_macs": counts.training_macs,
        }
    return rows


def main(_):
    if FLAGS.memory_of:
        print_peak_memory(*FLAGS.memory_of.rsplit("/", 1))
        return
    report = {"machine": runs.machine(), "rounds": FLAGS.rounds, "cases": {}}
    for case in CASES:
        report["cases"][case] = rows = measure(case)
        print(f"\n{case}")
        print(
            tabulate(
                [
                    [
                        name,
                        f"{row['step_time_over_bn']:.3f}",
                        "{:.3f} .. {:.3f}".format(*row["step_time_over_bn_quartiles"]),
                        f"{row['step_ms_p50']:.1f}",
                        f"{row['peak_memory_over_bn']:.3f}",
                        f"{row['peak_memory_mib']:.0f}",
                        f"{row['training_parameters']:,}",
                        f"{row['training_macs']:,}",
                    ]
                    for name, row in rows.items()
                ],
                ["", "time / BN", "quartiles", "ms", "memory / BN", "MiB", "parameters", "MACs"],
                tablefmt="github",
                disable_numparse=True,
            )
        )
    if FLAGS.output:
        runs.write_json(Path(FLAGS.output), report)


if __name__ == "__main__":
    app.run(main)
