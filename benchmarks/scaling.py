"""What would training on ImageNet cost on machines that are not here? python benchmarks/scaling.py

Arithmetic, not a measurement: from the step and the bytes in results/distributed.json and the input in
results/input.json, for hosts of eight accelerators that one network connects. The step of another network takes time in
proportion to its MACs. An accelerator is so many times as fast as the two cores of that measurement; measure yours, and
give the factor with --speedup. Nothing overlaps: first the step, then the exchange of gradients. Cores are those of a
host that decode its images, and that read the records of a TFDS dataset, which every host reads completely.
"""

import json
from pathlib import Path

from absl import app, flags
from tabulate import tabulate

from tf_repvgg.models import build_repvgg, complexity

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum("variant", ["A0", "B3"], ["A0", "B3"], "Networks.")
flags.DEFINE_float("speedup", 100, "Speed of an accelerator over that of the two measured cores.", lower_bound=0.01)
flags.DEFINE_integer("batch", 32, "Images per accelerator and step.", lower_bound=1)
flags.DEFINE_list("accelerators", ["8", "64", "512"], "Numbers of accelerators.")
flags.DEFINE_list("gigabits", ["10", "100", "400"], "Speeds of the network of a host, in Gb/s.")

RESULTS = Path(__file__).resolve().parents[1] / "results"
MEASURED, LAYOUT, EXCHANGE = "RepVGG-A0, 224x224, batch 16", "1 process, 2 cores", "2 workers, 1 core each"
DECODING, READING = "TFDS: read, decode a window, resize, normalize", "TFDS: read"
PER_HOST = 8
GOAL = 0.8
HEADERS = (
    "network",
    "accelerators",
    "Gb/s",
    "step, ms",
    "exchange, ms",
    "efficiency",
    "images/s",
    "decoded per host and s",
    "cores for that",
    "cores that read TFDS",
    f"batch for {GOAL:.0%}",
)


def read_measurements():
    """Images per second of A0 on two cores; bytes carried over those of the variables; images per second of a core that
    decodes, and of one that only reads records.
    """
    rows = json.loads((RESULTS / "distributed.json").read_text(encoding="utf-8"))["cases"][MEASURED]
    stages = json.loads((RESULTS / "input.json").read_text(encoding="utf-8"))["stages"]
    exchange = rows[EXCHANGE]
    # Of two workers each sends once what the ring of gradients needs; both directions were counted.
    overhead = exchange["bytes_per_step"] / 2 / exchange["trained_bytes"]
    decoded, read = (stages[stage]["images_per_second_p50"] for stage in (DECODING, READING))
    return rows[LAYOUT]["images_per_second_p50"], overhead, decoded, read


def plan(variant, relative_macs, trained_bytes):
    """The rows of a network."""
    speed, overhead, decoded, read = read_measurements()
    step = FLAGS.batch * relative_macs / (speed * FLAGS.speedup)
    for accelerators in map(int, FLAGS.accelerators):
        hosts = max(1, accelerators // PER_HOST)
        for gigabits in map(float, FLAGS.gigabits):
            # A ring of hosts: each sends its part of the gradients around twice.
            sent = 2 * (hosts - 1) / hosts * trained_bytes * overhead
            exchange = sent / (gigabits * 1e9 / 8)
            efficiency = step / (step + exchange)
            images = accelerators * FLAGS.batch / (step + exchange)
            batch = FLAGS.batch * exchange / step * GOAL / (1 - GOAL)
            yield [
                variant,
                accelerators,
                f"{gigabits:g}" if hosts > 1 else "one host",
                f"{1000 * step:.0f}",
                f"{1000 * exchange:.1f}",
                f"{100 * efficiency:.0f} %",
                f"{images:,.0f}",
                f"{images / hosts:,.0f}",
                f"{images / hosts / decoded:.1f}",
                f"{images / read:.1f}",  # every host reads the records of all
                f"{batch:.0f}" if hosts > 1 else "",
            ]
            if hosts == 1:
                break


def main(_):
    counts = {name: complexity(build_repvgg(name, (224, 224, 3), 1000)) for name in {"A0", *FLAGS.variant}}
    rows = []
    for variant in FLAGS.variant:
        relative_macs = counts[variant].training_macs / counts["A0"].training_macs
        rows += plan(variant, relative_macs, 4 * counts[variant].training_parameters)
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    app.run(main)
