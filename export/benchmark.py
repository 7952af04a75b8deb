"""Measures .tflite files side by side: python export/benchmark.py --files=a.tflite,b.tflite

The files may come from any tool. They take turns, so that a machine that slows down slows all of them alike, and each
runs in a process of its own. Writes benchmark.json and benchmark.csv to --output, if it is given.
"""

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import cli, provenance, regular_files, run_records, storage
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.tflite import METADATA_NAME
from tf_repvgg.tflite.isolated import Isolated, time_by_turns

FLAGS = flags.FLAGS

flags.DEFINE_list("files", None, "TFLite files.", required=True)
flags.DEFINE_integer("runs", 200, "Timed inferences of each file.", lower_bound=10)
flags.DEFINE_integer("warmup_runs", 20, "Inferences of each file before the timed ones.", lower_bound=0)
flags.DEFINE_integer("runs_per_turn", 10, "Inferences of a file before the turn of the next file.", lower_bound=1)
flags.DEFINE_integer("threads", 1, "Interpreter threads.", lower_bound=1, upper_bound=1024)
flags.DEFINE_integer("batch", 8, "Images in a batch when throughput is measured, of files with batch 1.", lower_bound=1)
flags.DEFINE_string("dataset", None, "Dataset on which accuracy is measured too: TFDS name, or folder:PATH.")
flags.DEFINE_string(
    "data_dir", None, "TFDS data directory that holds the dataset; for a folder, the directory of PATH."
)
flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Split on which accuracy is measured, whole.")
flags.DEFINE_string("output", None, "Folder to write to.")

# {key in benchmark.json: header of the printed table}
COLUMNS = {
    "file": "file",
    "batch": "batch",
    "latency_ms_p50": "p50 ms",
    "latency_ms_p90": "p90 ms",
    "latency_ms_p99": "p99 ms",
    "throughput_images_per_second": "images/s",
    "throughput_batch": "in batches",
    "peak_memory_mib": "peak MiB",
    "file_bytes": "bytes",
    "weight_bytes": "weight bytes",
    "macs": "MACs",
    "gmacs_per_second": "GMAC/s",
    "weight_entropy_bits": "bits/weight",
    "top1_percent": "top-1 %",
}
THROUGHPUT_RUNS = 10
RESULTS = ("benchmark.json", "benchmark.csv")


def main(_):
    with cli.bad_input_exits(), contextlib.ExitStack() as stack:
        paths = [Path(name) for name in FLAGS.files]
        if not paths:
            raise ValueError("--files is empty; name at least one .tflite file")
        output = claim_output(FLAGS.output) if FLAGS.output else None
        files = {str(path): stack.enter_context(Isolated(path.name, _read_file(path), FLAGS.threads)) for path in paths}
        times = time_by_turns(files, FLAGS.runs, FLAGS.warmup_runs, FLAGS.runs_per_turn)
        rows = [measure(path, files[str(path)], times[str(path)], FLAGS.batch) for path in paths]
        if FLAGS.dataset:
            for row in rows:
                row["top1_percent"] = round(measure_accuracy(row["file"], files[row["file"]]), 3)
    print_table(rows)
    if output:
        write_results(output, rows)


def claim_output(folder: str) -> Path:
    """Makes and claims the folder of the results, before anything is measured."""
    output = storage.claim_folder(folder)
    storage.check_no_folders(output / name for name in RESULTS)
    return output


def _read_file(path):
    return regular_files.read_bytes(path, regular_files.MAX_INTEGER_FILE_BYTES)


def measure(path: Path, file: Isolated, times: Sequence[float], batch: int) -> dict[str, Any]:
    """Measures all but the accuracy of a file.

    Args:
      path: Path of the file.
      file: The file in its process.
      times: Milliseconds of single inferences.
      batch: Images in a batch when throughput is measured; see `Isolated.throughput`.

    Returns:
      Entry of the file in benchmark.json.
    """
    costs, file_batch = file.costs(), file.batch()
    throughput = file.throughput(batch, THROUGHPUT_RUNS)
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    return {
        "file": str(path),
        "batch": file_batch,
        "latency_ms_p50": round(float(p50), 4),
        "latency_ms_p90": round(float(p90), 4),
        "latency_ms_p99": round(float(p99), 4),
        "throughput_images_per_second": round(throughput.images_per_second, 2),
        "throughput_batch": throughput.batch,
        "peak_memory_mib": round(file.peak_memory_mib(), 1),
        "file_bytes": path.stat().st_size,
        "weight_bytes": costs.weight_bytes,
        "macs": costs.macs,
        "gmacs_per_second": None if costs.macs is None else round(costs.macs / p50 / 1e6, 3),
        "weight_entropy_bits": None if costs.weight_entropy_bits is None else round(costs.weight_entropy_bits, 3),
    }


def measure_accuracy(name: str, file: Isolated) -> float:
    """Top-1 accuracy in percent on --dataset, preprocessed as the metadata in the file require."""
    content = file.metadata(METADATA_NAME)
    if content is None:
        raise ValueError(
            f"{name}: no metadata block {METADATA_NAME}, which describes how images are preprocessed; --dataset is for "
            "files of export/main.py"
        )
    metadata = run_records.parse_preprocessing(content, f"{name}, metadata block {METADATA_NAME}")
    data = ClassificationData(FLAGS.dataset, FLAGS.data_dir, Preprocessing.from_metadata(metadata))
    correct, total = 0, data.num_examples(FLAGS.split)
    with tqdm(total=total, desc=name, unit="image", leave=False) as bar:
        for images, labels in data.evaluation(FLAGS.split).as_numpy_iterator():
            logits = file.predict(images)
            if isinstance(logits, dict):
                raise ValueError(f"{name}: it has {len(logits)} outputs; accuracy is measured on files with one")
            correct += int(np.sum(np.argmax(logits, axis=1) == labels))
            bar.update(len(images))
    return 100 * correct / total


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = {key: header for key, header in COLUMNS.items() if key in rows[0]}
    print(f"{FLAGS.runs} runs, {FLAGS.threads} thread(s), LiteRT; latency and MACs are those of a whole batch\n")
    print(tabulate([[row[key] for key in columns] for row in rows], list(columns.values()), intfmt=","))


def write_results(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes benchmark.json and benchmark.csv."""
    record = {"flags": cli.key_flags(__name__), "machine": provenance.machine(), "files": rows}
    storage.write_json(output / RESULTS[0], record)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(output / RESULTS[1], table.getvalue().encode())


if __name__ == "__main__":
    cli.run(main)
