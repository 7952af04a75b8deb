"""Which post-training quantization serves which model best? python experiments/ptq.py --data_dir=...

Method by bits by granularity, in integer accuracy: takes the trained models of --runs, or those committed in
results/checkpoints, or trains configs/cifar10_*.flags; quantizes each with every method on 1,024 training images, and
runs every file over all test images in LiteRT, beside the files of Google's ai-edge-quantizer. About an hour on 2
cores. Resumable, on another machine too: each cell is measured once and kept in a file in results/ptq; results/ptq.json
and results/ptq.md hold all cells that there are, after every cell. --smoke tries everything on few images, in
runs/ptq_smoke.
"""

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import os
import sys

from absl import app, flags
from harness.commands import ROOT, train
from harness.ptq import ai_edge
from harness.ptq.cells import AI_EDGE, Cell, Settings, measure, measure_float, start_worker
from harness.ptq.page import compare, render
from harness.tables import write_results
from tqdm import tqdm

from tf_repvgg import cli, provenance
from tf_repvgg.quantization.ptq import Options, parse_method
from tf_repvgg.quantization.uniform import GRANULARITIES
from tf_repvgg.storage import FinishedWork

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with the dataset; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_string("cells", "results/ptq", "Folder of the results, one file for each cell of the table.")
flags.DEFINE_string("results", "results", "Folder of the table.")
flags.DEFINE_list(
    "models",
    ["cifar10_oabn", "cifar10_bn", "cifar10_qarepvgg", "cifar10_no_identity"],
    "Names of files in configs/, without .flags.",
)
RANGE_METHODS = ("min_max", "percentile", "mse", "octav", "equalize", "dfq", "dfq_data_free")
SLOW_METHODS = ("codebook", "adaround", "adaquant", "equalize+adaquant")
flags.DEFINE_list("methods", [*RANGE_METHODS, *SLOW_METHODS], "Methods, as of export/main.py --ptq.")
flags.DEFINE_list("bits", ["8", "6", "5", "4", "3"], "Weight widths; a method may have fewer of them in the table.")
flags.DEFINE_boolean("ai_edge", True, "Whether to measure Google's toolkit beside our methods.")
flags.DEFINE_integer("calibration_images", 1024, "Training images that methods see.", lower_bound=1)
flags.DEFINE_integer("test_images", None, "Number of test images; by default all.", lower_bound=1)
flags.DEFINE_integer("iterations", Options.iterations, "Steps per layer of methods that learn.", lower_bound=1)
flags.DEFINE_integer("workers", os.cpu_count(), "Processes that measure cells, each on one core.", lower_bound=1)
flags.DEFINE_boolean("smoke", False, "Checks that everything runs: few images and steps, in folders of their own.")

ALL_BITS, LOW_BITS = (8, 6, 5, 4, 3), (4, 3)
# Methods that learn take a minute a file; every method keeps 8 and 6 bits, so that two models suffice to show it.
SLOW_AT_MORE_BITS = ("cifar10_bn", "cifar10_oabn")


def check_flags():
    """Raises ValueError for an unknown method, or if ai-edge-quantizer is missing."""
    for method in FLAGS.methods:
        parse_method(method)
    if FLAGS.ai_edge and importlib.util.find_spec("ai_edge_quantizer") is None:
        raise ValueError(f"ai-edge-quantizer is not installed: {ai_edge.INSTALL}; or use --noai_edge")


def widths_of(model, method):
    if method.startswith(AI_EDGE):
        return ai_edge.BITS
    if method in RANGE_METHODS:
        return ALL_BITS
    return (8, 6, *LOW_BITS) if model in SLOW_AT_MORE_BITS else LOW_BITS


def list_cells(workdirs, methods, bits, with_ai_edge):
    """{name: cell} in the order in which they are measured: quick methods of all models, then slow ones."""
    toolkit = [AI_EDGE + algorithm for algorithm in ai_edge.ALGORITHMS] if with_ai_edge else []
    quick = [*toolkit, *(method for method in methods if method in RANGE_METHODS)]
    slow = [method for method in methods if method not in RANGE_METHODS]
    cells = (
        (model, Cell(str(workdir), method, width, granularity))
        for group in (quick, slow)
        for model, workdir in workdirs.items()
        for method in group
        for width in widths_of(model, method)
        if str(width) in bits
        for granularity in GRANULARITIES
    )
    return {f"{model}/{cell.name}": cell for model, cell in cells}


def start_record(trainings, settings):
    """The content of ptq.json, without cells."""
    return {
        "models": {model: {"training": training, "cells": []} for model, training in trainings.items()},
        "machine": provenance.machine(),
        "workers": FLAGS.workers,
        # Without data_dir: results are for other machines too.
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "data_dir"},
    }


def write(record, results):
    """Fills the record with the cells that there are, and writes it."""
    for model, content in record["models"].items():
        content["cells"] = [result for name, result in results.items() if result and name.startswith(f"{model}/")]
    record["comparable"] = compare(record["models"])
    write_results(ROOT / FLAGS.results, "ptq", record, render(record))


def measure_floats(pool, workdirs, settings, record):
    """Adds the float accuracy of each model to the record."""
    futures = {model: pool.submit(measure_float, str(workdir), settings) for model, workdir in workdirs.items()}
    with cli.bad_input_exits():  # such as a dataset that is missing
        for model, future in futures.items():
            record["models"][model]["float_top1_percent"] = future.result()


def measure_cells(pool, cells, settings):
    """Yields (name, result) of cells as they are done; a result is an exception if its cell failed."""
    futures = {pool.submit(measure, cell, settings): name for name, cell in cells.items()}
    for future in tqdm(concurrent.futures.as_completed(futures), "cells", len(futures), unit="cell"):
        yield futures[future], future.exception() or future.result()


def main(_):
    with cli.bad_input_exits():
        check_flags()
    if FLAGS.smoke:
        FLAGS.calibration_images, FLAGS.test_images, FLAGS.iterations = 32, 200, 4
        FLAGS.cells, FLAGS.results = "runs/ptq_smoke/cells", "runs/ptq_smoke"
    settings = Settings(FLAGS.data_dir, FLAGS.calibration_images, FLAGS.test_images, FLAGS.iterations)
    trainings = {model: train(model, f"{FLAGS.runs}/{model}", data_dir=FLAGS.data_dir) for model in FLAGS.models}
    workdirs = {model: ROOT / FLAGS.runs / model for model in FLAGS.models}
    record = start_record(trainings, settings)
    cells = list_cells(workdirs, FLAGS.methods, FLAGS.bits, FLAGS.ai_edge)
    kept = FinishedWork(ROOT / FLAGS.cells)
    results = {name: kept.find(name, cell.find_inputs(settings)) for name, cell in cells.items()}
    missing = {name: cell for name, cell in cells.items() if results[name] is None}
    failures = []
    context = multiprocessing.get_context("spawn")  # TensorFlow's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(FLAGS.workers, context, start_worker) as pool:
        measure_floats(pool, workdirs, settings, record)
        for name, result in measure_cells(pool, missing, settings):
            if isinstance(result, Exception):
                failures.append(f"experiments/ptq.py: error: {name.replace('/', ', ')}: {result}")
                continue
            results[name] = kept.keep(name, cells[name].find_inputs(settings), result)
            write(record, results)
    write(record, results)
    print(render(record))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    app.run(main)
