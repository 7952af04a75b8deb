"""Cost of a training step with clustered weights, ours and tfmot's: python benchmarks/cluster_step.py

Times are ratios to plain fine-tuning of the fused network within this run, round by round. Turns are of ten steps, in
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
from tf_repvgg.training import optimization

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 8, "Rounds in which every method takes its turn.", lower_bound=3)
flags.DEFINE_list("states", ["4", "8", "16"], "Clusters; those of memory are the first.")
flags.DEFINE_multi_enum("variant", ["cifar-s", "A0"], ["cifar-s", "A0"], "Networks to measure.")
flags.DEFINE_multi_enum("measure", ["time", "memory"], ["time", "memory"], "What to measure of them.")
flags.DEFINE_string(
    "output", None, "JSON file to write, such as results/cluster_step.json; what it says and is not measured stays."
)
flags.DEFINE_string("memory_of", None, "Internal: CASE/METHOD/STATES whose peak memory this process measures.")

CASES = {
    "CIFAR model, 32x32, batch 128": ("cifar-s", (32, 32, 3), 10, 128),
    "RepVGG-A0, 224x224, batch 8": ("A0", (224, 224, 3), 1000, 8),
}
REFERENCE = "plain fine-tuning"
# What a float model becomes: (model, states, per channel) -> what is trained.
WAYS = {
    "ours": lambda model, states, per_channel: cluster_quantize(
        model, states, cluster_per_channel=per_channel, activation_bits=None
    ),
    "ours, 8-bit activations": lambda model, states, per_channel: cluster_quantize(
        model, states, cluster_per_channel=per_channel
    ),
    # Equally spaced centroids: k-means++ takes minutes for A0, and its steps would be the same operations.
    "tfmot's ClusterWeights": lambda model, states, per_channel: tfmot_cluster(
        model, states, CentroidInitialization.LINEAR, cluster_per_channel=per_channel
    ),
}
GRANULARITIES = {"per tensor": False, "per channel": True}
METHODS = {
    REFERENCE: lambda model, states: model,
    "tfmot's 8-bit QAT": lambda model, states: tfmot.quantization.keras.quantize_model(model),
    **{
        f"{name}, {granularity}": (lambda model, states, way=way, per=per: way(model, states, per))
        for name, way in WAYS.items()
        for granularity, per in GRANULARITIES.items()
    },
}
# A0 has 5,496 channels, each of them some nodes in the graph of tfmot's loop over channels: after four minutes of
# processor time and with 5 GB, it had not made five steps.
LEFT_OUT = {"RepVGG-A0, 224x224, batch 8": ["tfmot's ClusterWeights, per channel"]}
_STEPS_PER_TURN = 10
_MEMORY_STEPS = 2 * _STEPS_PER_TURN
_PROCESSES = 3


def methods_of(case):
    return [name for name in METHODS if name not in LEFT_OUT.get(case, ())]


def make_step(case, name, states):
    """A function that runs one training step on random data."""
    variant, shape, classes, batch_size = CASES[case]
    model = METHODS[name](fusion.fuse(build_repvgg(variant, shape, classes)), states)
    # A rate at which nothing diverges on random labels, tfmot's centroids neither.
    model.compile(optimization.make_optimizer(1e-7, steps=10_000, warmup_steps=1), optimization.CrossEntropy(classes))
    generator = np.random.default_rng(0)
    images = generator.standard_normal([batch_size, *shape]).astype(np.float32)
    labels = generator.integers(0, classes, batch_size)
    return side_by_side.training_step(model, images, labels)


def measure(case, states):
    """{method: its row}."""
    steps = {name: make_step(case, name, states) for name in methods_of(case)}
    found = side_by_side.times(steps, FLAGS.rounds, f"{case}, {states} states", _STEPS_PER_TURN)
    ratios = side_by_side.ratios(found, REFERENCE)
    return {
        name: {
            "step_ms_p50": round(1000 * float(np.median(found[name])), 2),
            "step_time": ratios[name][0],
            "step_time_quartiles": ratios[name][1:],
        }
        for name in steps
    }


def measure_memory(case, states):
    """{method: (peak MiB, ratio to the reference)}."""
    bar = tqdm(methods_of(case), desc=f"{case}: memory", leave=False)
    found = {name: side_by_side.peak_memory(f"{case}/{name}/{states}", _PROCESSES) for name in bar}
    return {name: (round(mib, 1), round(mib / found[REFERENCE], 4)) for name, mib in found.items()}


def main(_):
    if FLAGS.memory_of:
        case, name, states = FLAGS.memory_of.rsplit("/", 2)
        side_by_side.print_peak_memory(make_step(case, name, int(states)), _MEMORY_STEPS)
        return
    all_states = [int(word) for word in FLAGS.states]
    for case in (case for case, (variant, *_) in CASES.items() if variant in FLAGS.variant):
        found = {"machine": provenance.machine()}
        if "time" in FLAGS.measure:
            found |= {"rounds": FLAGS.rounds, "times": {str(states): measure(case, states) for states in all_states}}
        if "memory" in FLAGS.measure:
            found["peak_memory_mib_and_ratio"] = measure_memory(case, all_states[0])
        print(f"\n{case}: ratios to {REFERENCE}\n{_table(case, found)}", flush=True)
        if FLAGS.output:
            output = Path(FLAGS.output)
            report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
            report[case] = report.get(case, {}) | found
            storage.write_json(output, report)


def _table(case, found):
    columns = {
        f"time, {states} states": {
            name: "{:.3f} ({:.3f} .. {:.3f})".format(row["step_time"], *row["step_time_quartiles"])
            for name, row in of.items()
        }
        for states, of in found.get("times", {}).items()
    }
    if memory := found.get("peak_memory_mib_and_ratio"):
        columns[f"memory, {FLAGS.states[0]} states"] = {name: f"{ratio:.3f}" for name, (_, ratio) in memory.items()}
    rows = [[name, *(column[name] for column in columns.values())] for name in methods_of(case)]
    return tabulate(rows, ["", *columns], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    app.run(main)
