"""What does a training step with clustered weights cost, ours and tfmot's? python benchmarks/cluster_step.py

Times are ratios to plain fine-tuning of the fused network within this run, round by round. Turns have ten steps, in
one of which ours moves its centroids. Peak memory is the median of three processes per method. The CIFAR model
alone (--variant=cifar-s) takes 25 minutes.
"""

import json
from pathlib import Path

import numpy as np
import side_by_side
import tensorflow_model_optimization as tfmot
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import fusion, provenance, storage
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import cluster_quantize
from tf_repvgg.quantization.qat.clustering import CentroidInitialization
from tf_repvgg.quantization.qat.tfmot_baseline import tfmot_cluster
from tf_repvgg.quantization.uniform import GRANULARITIES
from tf_repvgg.training import optimization

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 8, "Rounds in which every method takes its turn.", lower_bound=3)
flags.DEFINE_list("states", ["4", "8", "16"], "Numbers of clusters; memory is measured with the first of them.")
flags.DEFINE_multi_enum("variant", ["cifar-s", "A0"], ["cifar-s", "A0"], "Networks to measure.")
flags.DEFINE_multi_enum("measure", ["time", "memory"], ["time", "memory"], "Quantities to measure.")
flags.DEFINE_string(
    "output", None, "JSON file to write, such as results/cluster_step.json; entries that are not measured again stay."
)
flags.DEFINE_string("memory_of", None, "Internal: CASE/METHOD/CLUSTERS whose peak memory this process measures.")

CASES = {
    "CIFAR model, 32x32, batch 128": ("cifar-s", (32, 32, 3), 10, 128),
    "RepVGG-A0, 224x224, batch 8": ("A0", (224, 224, 3), 1000, 8),
}
REFERENCE = "plain fine-tuning"
# {name: function of a float model, a number of clusters and per_channel that makes the model to train}
CLUSTERINGS = {
    "ours": lambda model, clusters, per_channel: cluster_quantize(
        model, clusters, cluster_per_channel=per_channel, activation_bits=None
    ),
    "ours, 8-bit activations": lambda model, clusters, per_channel: cluster_quantize(
        model, clusters, cluster_per_channel=per_channel
    ),
    # Equally spaced centroids: k-means++ takes minutes for A0, and the steps would run the same operations.
    "tfmot's ClusterWeights": lambda model, clusters, per_channel: tfmot_cluster(
        model, clusters, CentroidInitialization.LINEAR, cluster_per_channel=per_channel
    ),
}


def make_method(clustering, granularity):
    """A function of a float model and a number of clusters that makes the model to train."""
    return lambda model, clusters: clustering(model, clusters, granularity == "per_channel")


METHODS = {
    REFERENCE: lambda model, clusters: model,
    "tfmot's 8-bit QAT": lambda model, clusters: tfmot.quantization.keras.quantize_model(model),
    **{
        f"{name}, {GRANULARITIES[granularity]}": make_method(clustering, granularity)
        for name, clustering in CLUSTERINGS.items()
        for granularity in GRANULARITIES
    },
}
# A0 has 5,496 channels, each with several nodes in the graph of tfmot's loop over channels: after four minutes of
# processor time and with 5 GB, it had not made five steps.
SKIPPED = {"RepVGG-A0, 224x224, batch 8": ["tfmot's ClusterWeights, per channel"]}
_STEPS_PER_TURN = 10
_MEMORY_STEPS = 2 * _STEPS_PER_TURN
_PROCESSES = 3


def list_methods(case):
    return [name for name in METHODS if name not in SKIPPED.get(case, ())]


def make_step(case, name, clusters):
    """A function that runs one training step on random data."""
    variant, shape, classes, batch_size = CASES[case]
    model = METHODS[name](fusion.fuse(build_repvgg(variant, shape, classes)), clusters)
    # A rate at which nothing diverges on random labels, not even tfmot's centroids.
    model.compile(optimization.make_optimizer(1e-7, steps=10_000, warmup_steps=1), optimization.CrossEntropy(classes))
    generator = np.random.default_rng(0)
    images = generator.standard_normal([batch_size, *shape]).astype(np.float32)
    labels = generator.integers(0, classes, batch_size)
    return side_by_side.make_training_step(model, images, labels)


def measure_time(case, clusters):
    """{method: its row}."""
    steps = {name: make_step(case, name, clusters) for name in list_methods(case)}
    seconds = side_by_side.measure_times(steps, FLAGS.rounds, f"{case}, {clusters} clusters", _STEPS_PER_TURN)
    ratios = side_by_side.compare_times(seconds, REFERENCE)
    return {
        name: {
            "step_ms_p50": round(1000 * float(np.median(seconds[name])), 2),
            "step_time": ratios[name][0],
            "step_time_quartiles": ratios[name][1:],
        }
        for name in steps
    }


def measure_memory(case, clusters):
    """{method: (peak MiB, ratio to the reference)}."""
    bar = tqdm(list_methods(case), desc=f"{case}: memory", leave=False)
    mib = {name: side_by_side.measure_peak_memory(f"{case}/{name}/{clusters}", _PROCESSES) for name in bar}
    return {name: (round(peak, 1), round(peak / mib[REFERENCE], 4)) for name, peak in mib.items()}


def measure(case, clusters):
    """The part of the report on one case, as far as --measure requests it."""
    record = {"machine": provenance.machine()}
    if "time" in FLAGS.measure:
        record |= {"rounds": FLAGS.rounds, "times": {str(count): measure_time(case, count) for count in clusters}}
    if "memory" in FLAGS.measure:
        record["peak_memory_mib_and_ratio"] = measure_memory(case, clusters[0])
    return record


def make_table(case, record):
    columns = {
        f"time, {clusters} clusters": {
            name: "{:.3f} ({:.3f} .. {:.3f})".format(row["step_time"], *row["step_time_quartiles"])
            for name, row in rows.items()
        }
        for clusters, rows in record.get("times", {}).items()
    }
    if memory := record.get("peak_memory_mib_and_ratio"):
        columns[f"memory, {FLAGS.states[0]} clusters"] = {name: f"{ratio:.3f}" for name, (_, ratio) in memory.items()}
    rows = [[name, *(column[name] for column in columns.values())] for name in list_methods(case)]
    return tabulate(rows, ["", *columns], tablefmt="github", disable_numparse=True)


def write(path, case, record):
    """Adds the measurements of a case to a JSON file."""
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report[case] = report.get(case, {}) | record
    storage.write_json(path, report)


def main(_):
    if FLAGS.memory_of:
        case, name, clusters = FLAGS.memory_of.rsplit("/", 2)
        side_by_side.print_peak_memory(make_step(case, name, int(clusters)), _MEMORY_STEPS)
        return
    for case in (case for case, (variant, *_) in CASES.items() if variant in FLAGS.variant):
        record = measure(case, [int(count) for count in FLAGS.states])
        print(f"\n{case}: ratios to {REFERENCE}\n{make_table(case, record)}", flush=True)
        if FLAGS.output:
            write(Path(FLAGS.output), case, record)


if __name__ == "__main__":
    app.run(main)
