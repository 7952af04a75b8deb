"""Measures .tflite files side by side: python export/benchmark.py --files=a.tflite,b.tflite

Ours or anyone's. Files take turns, so that a machine that slows down slows all alike; each runs in a process of its
own. Leaves benchmark.json and benchmark.csv in --output, if that is given.
"""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import cli, provenance, storage
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.tflite import METADATA_NAME
from tf_repvgg.tflite.isolated import Isolated, interleaved_times

FLAGS = flags.FLAGS

flags.DEFINE_list("files", None, "TFLite files.", required=True)
flags.DEFINE_integer("runs", 200, "Timed inferences of each file.", lower_bound=10)
flags.DEFINE_integer("warmup_runs", 20, "Inferences before those.", lower_bound=0)
flags.DEFINE_integer("runs_per_turn", 10, "Inferences before it is the next file's turn.", lower_bound=1)
flags.DEFINE_integer("threads", 1, "Interpreter threads.", lower_bound=1)
flags.DEFINE_integer("batch", 8, "Images at a time for throughput.", lower_bound=1)
flags.DEFINE_string("dataset", None, "Measure accuracy too: TFDS name, or folder:PATH.")
flags.DEFINE_string("data_dir", None, "TFDS data directory that holds the set; for a folder, where PATH starts.")
flags.DEFINE_string("split", "test", "Split for accuracy, whole.")
flags.DEFINE_string("output", None, "Folder to write to.")

COLUMNS = {
    "file": "file",
    "latency_ms_p50": "p50 ms",
    "latency_ms_p90": "p90 ms",
    "latency_ms_p99": "p99 ms",
    "throughput_images_per_second": "images/s",
    "peak_memory_mib": "peak MiB",
    "file_bytes": "bytes",
    "weight_bytes": "weight bytes",
    "macs": "MACs",
    "gmacs_per_second": "GMAC/s",
    "weight_entropy_bits": "bits/weight",
    "top1_percent": "top-1 %",
}


def accuracy(name, file):
    """Top-1 in percent on --dataset, preprocessed as the file's own metadata say."""
    content = file.metadata(METADATA_NAME)
    if content is None:
        raise ValueError(
            f"{name}: no metadata block {METADATA_NAME}, which tells how images are preprocessed; --dataset is for "
            "files of export/main.py"
        )
    data = ClassificationData(FLAGS.dataset, FLAGS.data_dir, Preprocessing.from_facts(json.loads(content)))
    right, total = 0, data.num_examples(FLAGS.split)
    with tqdm(total=total, desc=name, unit="image", leave=False) as bar:
        for images, labels in data.evaluation(FLAGS.split).as_numpy_iterator():
            right += int(np.sum(np.argmax(file.predict(images), axis=1) == labels))
            bar.update(len(images))
    return 100 * right / total


def row(path, file, times):
    costs = file.costs()
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    return {
        "file": str(path),
        "latency_ms_p50": round(float(p50), 4),
        "latency_ms_p90": round(float(p90), 4),
        "latency_ms_p99": round(float(p99), 4),
        "throughput_images_per_second": round(file.throughput(FLAGS.batch, 10), 2),
        "peak_memory_mib": round(file.peak_memory_mib(), 1),
        "file_bytes": path.stat().st_size,
        "weight_bytes": costs.weight_bytes,
        "macs": costs.macs,
        "gmacs_per_second": round(costs.macs / p50 / 1e6, 3),
        "weight_entropy_bits": None if costs.weight_entropy_bits is None else round(costs.weight_entropy_bits, 3),
    }


def write(output, rows):
    storage.write_json(
        output / "benchmark.json", {"flags": cli.key_flags(), "machine": provenance.machine(), "files": rows}
    )
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(output / "benchmark.csv", table.getvalue().encode())


def main(_):
    with cli.bad_input_exits(), contextlib.ExitStack() as stack:
        paths = [Path(name) for name in FLAGS.files]
        files = {
            str(path): stack.enter_context(Isolated(path.name, path.read_bytes(), FLAGS.threads)) for path in paths
        }
        times = interleaved_times(files, FLAGS.runs, FLAGS.warmup_runs, FLAGS.runs_per_turn)
        rows = [row(path, files[str(path)], times[str(path)]) for path in paths]
        if FLAGS.dataset:
            for each in rows:
                each["top1_percent"] = round(accuracy(each["file"], files[each["file"]]), 3)
        output = FLAGS.output and storage.claim_folder(FLAGS.output)
    columns = {key: words for key, words in COLUMNS.items() if key in rows[0]}
    print(f"{FLAGS.runs} runs, {FLAGS.threads} thread(s), batch 1; throughput in batches of {FLAGS.batch}; LiteRT\n")
    print(tabulate([[each[key] for key in columns] for each in rows], list(columns.values()), intfmt=","))
    if output:
        write(output, rows)


if __name__ == "__main__":
    cli.run(main)
