"""What does training on two machines cost beside one? python benchmarks/distributed.py

Images per second of one process on one core, of two workers on one core each that are connected over loopback, and of
one process on two cores, all with the same global batch on random images: ratios within a round, in which every layout
takes its turn. Bytes are those that TCP has carried between the two workers, as the command `ss` (iproute2, Linux)
counts them, beside those of the trained variables, whose gradients are what must be exchanged. Takes half an hour.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import provenance, storage
from tf_repvgg.models import build_repvgg
from tf_repvgg.training import optimization
from tf_repvgg.training.cluster import VARIABLE, Cluster
from tf_repvgg.training.distribution import Distribution

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "Rounds in which every layout takes its turn.", lower_bound=1)
flags.DEFINE_multi_enum("variant", ["cifar-s", "A0"], ["cifar-s", "A0"], "Networks to measure.")
flags.DEFINE_integer("first_port", 24600, "The two workers listen on this port and the next one.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, such as results/distributed.json.")
flags.DEFINE_string("worker_of", None, "Internal: variant that this process trains.")

# {variant: (title, image shape, classes, global batch, timed steps)}
CASES = {
    "cifar-s": ("CIFAR model, 32x32, batch 128", (32, 32, 3), 10, 128, 20),
    "A0": ("RepVGG-A0, 224x224, batch 16", (224, 224, 3), 1000, 16, 8),
}
# {layout: cores of each of its processes}
LAYOUTS = {
    "1 process, 1 core": [{0}],
    "2 workers, 1 core each": [{0}, {1}],
    "1 process, 2 cores": [{0, 1}],
}
REFERENCE = "1 process, 1 core"
_AGREEMENTS = 50
_SECONDS = 600


def train(variant):
    """Trains in this process, as TF_CONFIG says; prints what it measured as JSON."""
    _, shape, classes, batch_size, steps = CASES[variant]
    distribution, ports = Distribution(), []
    if text := os.environ.get(VARIABLE):
        cluster = Cluster.read(text)
        distribution = Distribution(cluster.connect(_SECONDS), cluster)
        ports = [address.rpartition(":")[2] for address in cluster.addresses]
    with distribution.scope():
        model = build_repvgg(variant, shape, classes)
        optimizer = optimization.make_optimizer(0.01, steps=10_000, warmup_steps=1, weight_decay=1e-3)
        model.compile(optimizer, optimization.CrossEntropy(classes))
    generator = np.random.default_rng(0)
    count = batch_size // distribution.replicas
    images = generator.standard_normal([count, *shape]).astype(np.float32)
    labels = generator.integers(0, classes, count)
    dataset = distribution.distribute(lambda shard: tf.data.Dataset.from_tensors((images, labels)).repeat())
    batches, take_step = iter(dataset), model.make_train_function()
    float(take_step(batches)["loss"]), float(take_step(batches)["loss"])
    bytes_before, seconds = count_bytes(ports), []
    for _ in range(steps):
        started = time.perf_counter()
        float(take_step(batches)["loss"])
        seconds.append(time.perf_counter() - started)
    record = {"step_seconds": float(np.median(seconds)), "bytes_per_step": (count_bytes(ports) - bytes_before) / steps}
    record["trained_bytes"] = sum(4 * int(np.prod(weight.shape)) for weight in model.trainable_weights)
    started = time.perf_counter()
    for _ in range(_AGREEMENTS):
        distribution.agree(is_due=False, is_ending=False)
    record["agreement_ms"] = 1000 * (time.perf_counter() - started) / _AGREEMENTS
    print(json.dumps(record))


def count_bytes(ports):
    """Bytes that connections to these ports have carried, in both directions."""
    if not ports:
        return 0
    condition = " or ".join(f"sport = :{port}" for port in ports)
    listing = subprocess.run(["ss", "-tinH", condition], check=True, capture_output=True, text=True).stdout
    return sum(int(count) for count in re.findall(r"\bbytes_(?:sent|received):(\d+)", listing))


def run_layout(variant, layout):
    """What the first process of a layout measured."""
    workers = [f"127.0.0.1:{FLAGS.first_port + index}" for index in range(len(LAYOUTS[layout]))]
    processes = []
    for index, cores in enumerate(LAYOUTS[layout]):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        if len(workers) > 1:
            task = {"type": "worker", "index": index}
            environment[VARIABLE] = json.dumps({"cluster": {"worker": workers}, "task": task})
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, f"--worker_of={variant}"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return json.loads(outputs[0].splitlines()[-1])


def measure(variant):
    """{layout: its row}."""
    _, _, _, batch_size, _ = CASES[variant]
    records = {layout: [] for layout in LAYOUTS}
    bar = tqdm(total=FLAGS.rounds * len(LAYOUTS), desc=variant, leave=False)
    for turn in range(FLAGS.rounds):
        for layout in np.roll(list(LAYOUTS), turn):
            records[layout].append(run_layout(variant, layout))
            bar.update()
    rows = {}
    for layout, measured in records.items():
        seconds = np.array([record["step_seconds"] for record in measured])
        ratios = np.array([record["step_seconds"] for record in records[REFERENCE]]) / seconds
        rows[layout] = {
            "step_ms": [round(1000 * second, 1) for second in seconds.tolist()],
            "images_per_second_p50": round(batch_size / float(np.median(seconds)), 2),
            "speed_over_one_core_p50": round(float(np.median(ratios)), 3),
            "speed_over_one_core": [round(ratio, 3) for ratio in ratios.tolist()],
        }
        if len(LAYOUTS[layout]) > 1:
            rows[layout] |= {
                "bytes_per_step": round(float(np.median([record["bytes_per_step"] for record in measured]))),
                "trained_bytes": measured[0]["trained_bytes"],
                "agreement_ms_p50": round(float(np.median([record["agreement_ms"] for record in measured])), 2),
            }
    return rows


def make_table(rows):
    cells = [
        [
            layout,
            f"{row['images_per_second_p50']:.1f}",
            f"{row['speed_over_one_core_p50']:.2f}",
            "{:.2f} .. {:.2f}".format(min(row["speed_over_one_core"]), max(row["speed_over_one_core"])),
            f"{row['bytes_per_step'] / row['trained_bytes']:.3f}" if "bytes_per_step" in row else "",
        ]
        for layout, row in rows.items()
    ]
    headers = ("", "images/s", "/ 1 core", "rounds", "bytes exchanged / trained")
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def main(_):
    if FLAGS.worker_of:
        train(FLAGS.worker_of)
        return
    report = {"machine": provenance.machine(), "rounds": FLAGS.rounds, "cases": {}}
    for variant in FLAGS.variant:
        title = CASES[variant][0]
        report["cases"][title] = measure(variant)
        print(f"\n{title}\n{make_table(report['cases'][title])}", flush=True)
        if FLAGS.output:
            storage.write_json(Path(FLAGS.output), report)


if __name__ == "__main__":
    app.run(main)
