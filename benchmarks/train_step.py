"""What does a training step of OABN and QARepVGG cost, beside BN? python benchmarks/train_step.py

Times are ratios to plain BN within this run, round by round. Peak memory comes from one process per model.
"""

from pathlib import Path

import numpy as np
import side_by_side
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import provenance, storage
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
MODELS = {
    "BN": {},
    "OABN": {"norm": "oabn"},
    # The limit of configs/cifar10_oabn.flags, for which every step merges the kernels of the other branches.
    "OABN, k=4std": {"norm": "oabn", "oabn_k": "4std"},
    "QARepVGG": {"block": "qarepvgg"},
}
HEADERS = ("", "time / BN", "quartiles", "ms", "memory / BN", "MiB", "parameters", "MACs")


def make_step(case, name):
    """A function that runs one training step on random data."""
    variant, shape, classes, batch_size = CASES[case]
    model = build_repvgg(variant, shape, classes, **MODELS[name])
    optimizer = optimization.make_optimizer(0.01, steps=10_000, warmup_steps=1, weight_decay=1e-3)
    model.compile(optimizer, optimization.CrossEntropy(classes))
    generator = np.random.default_rng(0)
    images = generator.standard_normal([batch_size, *shape]).astype(np.float32)
    labels = generator.integers(0, classes, batch_size)
    return side_by_side.make_training_step(model, images, labels)


def measure(case):
    """{model: its row}."""
    variant, shape, classes, _ = CASES[case]
    seconds = side_by_side.measure_times({name: make_step(case, name) for name in MODELS}, FLAGS.rounds, case)
    ratios = side_by_side.compare_times(seconds, "BN")
    bar = tqdm(MODELS, desc=f"{case}: memory", leave=False)
    memory = {name: side_by_side.measure_peak_memory(f"{case}/{name}") for name in bar}
    rows = {}
    for name, options in MODELS.items():
        counts = complexity(build_repvgg(variant, shape, classes, **options))
        ratio, *quartiles = ratios[name]
        rows[name] = {
            "step_ms_p50": round(1000 * float(np.median(seconds[name])), 2),
            "step_time_over_bn": ratio,
            "step_time_over_bn_quartiles": quartiles,
            "peak_memory_mib": round(memory[name], 1),
            "peak_memory_over_bn": round(memory[name] / memory["BN"], 4),
            "training_parameters": counts.training_parameters,
            "training_macs": counts.training_macs,
        }
    return rows


def make_table(rows):
    cells = [
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
    ]
    return tabulate(cells, HEADERS, tablefmt="github", disable_numparse=True)


def main(_):
    if FLAGS.memory_of:
        side_by_side.print_peak_memory(make_step(*FLAGS.memory_of.rsplit("/", 1)))
        return
    report = {"machine": provenance.machine(), "rounds": FLAGS.rounds, "cases": {}}
    for case in CASES:
        report["cases"][case] = measure(case)
        print(f"\n{case}\n{make_table(report['cases'][case])}", flush=True)
    if FLAGS.output:
        storage.write_json(Path(FLAGS.output), report)


if __name__ == "__main__":
    app.run(main)
