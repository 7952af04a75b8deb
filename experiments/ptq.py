"""Post-training quantization of CIFAR-10 models: method by bits by granularity, in integer accuracy.

python experiments/ptq.py --data_dir=...  takes the trained models of --runs, or those committed in results/checkpoints,
or trains configs/cifar10_*.flags; quantizes each with every method on 1,024 training images, and runs every file over
all test images in LiteRT, beside those of Google's ai-edge-quantizer. About an hour on 2 cores. Resumable, on another
machine too: each cell is measured once, a file in results/ptq, and results/ptq.json and results/ptq.md hold all that
there are after every cell. --smoke tries everything out on few images, in runs/ptq_smoke.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import sys

from absl import app, flags
from harness.commands import ROOT, train
from harness.ptq.ai_edge import ALGORITHMS, INSTALL
from harness.ptq.ai_edge import BITS as AI_EDGE_BITS
from harness.ptq.cells import AI_EDGE, Cell, Settings, float_top1_percent, measure, path_of, read, start_worker
from harness.ptq.page import comparable, page
from harness.tables import write_results
from tqdm import tqdm

from tf_repvgg import cli, provenance, runs, storage
from tf_repvgg.quantization.ptq import Options, parse_method
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with the dataset; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_string("cells", "results/ptq", "Folder of what was measured, a file for each cell of the table.")
flags.DEFINE_string("results", "results", "Folder of the table.")
flags.DEFINE_list(
    "models",
    ["cifar10_oabn", "cifar10_bn", "cifar10_qarepvgg", "cifar10_no_identity"],
    "Names of files in configs/, without .flags.",
)
RANGE_METHODS = ("min_max", "percentile", "mse", "octav", "equalize", "dfq", "dfq_data_free")
SLOW_METHODS = ("codebook", "adaround", "adaquant", "equalize+adaquant")
flags.DEFINE_list("methods", [*RANGE_METHODS, *SLOW_METHODS], "Methods, as of export/main.py --ptq.")
flags.DEFINE_list("bits", ["8", "6", "5", "4", "3"], "Of weights, as far as the table has them.")
flags.DEFINE_boolean("ai_edge", True, "Google's toolkit beside ours.")
flags.DEFINE_integer("calibration_images", 1024, "Training images that methods see.", lower_bound=1)
flags.DEFINE_integer("test_images", None, "How many test images; by default all.", lower_bound=1)
flags.DEFINE_integer("iterations", Options.iterations, "Steps per layer of methods that learn.", lower_bound=1)
flags.DEFINE_integer("workers", os.cpu_count(), "Processes that measure cells, each on one core.", lower_bound=1)
flags.DEFINE_boolean("smoke", False, "Few images and steps, in folders of their own: whether everything runs.")

ALL_BITS, LOW_BITS = (8, 6, 5, 4, 3), (4, 3)
# Methods that learn take a minute a file; where every method keeps 8 and 6 bits, two models show it.
SLOW_AT_MORE_BITS = ("cifar10_bn", "cifar10_oabn")


def bits_for(model, method):
    if method.startswith(AI_EDGE):
        return AI_EDGE_BITS
    if method in RANGE_METHODS:
        return ALL_BITS
    return (8, 6, *LOW_BITS) if model in SLOW_AT_MORE_BITS else LOW_BITS


def workdir_of(model):
    """Where the trained model lies, trained now if it has to be; and what its training ended with."""
    for folder in (ROOT / FLAGS.runs / model, ROOT / "results" / "checkpoints" / model):
        if (folder / runs.MODEL_NAME).exists() and (folder / "result.json").exists():
            return folder, json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return ROOT / FLAGS.runs / model, train(model, f"{FLAGS.runs}/{model}", data_dir=FLAGS.data_dir)


def cells_of(workdirs):
    """(model, cell) in the order in which they are measured: quick methods of all models, then slow ones."""
    google = [AI_EDGE + algorithm for algorithm in ALGORITHMS] if FLAGS.ai_edge else []
    quick = [*google, *(method for method in FLAGS.methods if method in RANGE_METHODS)]
    slow = [method for method in FLAGS.methods if method not in RANGE_METHODS]
    return [
        (model, Cell(str(workdir), method, bits, granularity))
        for methods in (quick, slow)
        for model, workdir in workdirs.items()
        for method in methods
        for bits in bits_for(model, method)
        if str(bits) in FLAGS.bits
        for granularity in GRANULARITIES
    ]


def main(_):
    with cli.bad_input_exits():
        for method in FLAGS.methods:
            parse_method(method)
        if FLAGS.ai_edge and importlib.util.find_spec("ai_edge_quantizer") is None:
            raise ValueError(f"ai-edge-quantizer is not installed: {INSTALL}; or use --noai_edge")
    if FLAGS.smoke:
        FLAGS.calibration_images, FLAGS.test_images, FLAGS.iterations = 32, 200, 4
        FLAGS.cells, FLAGS.results = "runs/ptq_smoke/cells", "runs/ptq_smoke"
    settings = Settings(FLAGS.data_dir, FLAGS.calibration_images, FLAGS.test_images, FLAGS.iterations)
    workdirs, record = {}, {"models": {}, "machine": provenance.machine(), "workers": FLAGS.workers}
    for model in FLAGS.models:
        workdirs[model], trained = workdir_of(model)
        record["models"][model] = {"training": trained, "cells": []}
    record["settings"] = dataclasses.asdict(settings)
    del record["settings"]["data_dir"]  # results are for other machines too
    places = {path_of(ROOT / FLAGS.cells, model, cell): (model, cell) for model, cell in cells_of(workdirs)}
    found = {path: read(path, cell.asked(settings)) for path, (_, cell) in places.items()}

    def write():
        for model, its in record["models"].items():
            its["cells"] = [found[path] for path, (of, _) in places.items() if of == model and found[path]]
        record["comparable"] = comparable(record["models"])
        write_results(ROOT / FLAGS.results, "ptq", record, page(record))

    context = multiprocessing.get_context("spawn")  # TensorFlow's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(FLAGS.workers, context, start_worker) as pool:
        floats = {model: pool.submit(float_top1_percent, str(path), settings) for model, path in workdirs.items()}
        with cli.bad_input_exits():  # such as a dataset that is not there
            for model, future in floats.items():
                record["models"][model]["float_top1_percent"] = future.result()
        measured = {
            pool.submit(measure, cell, settings): path for path, (_, cell) in places.items() if found[path] is None
        }
        failures = []
        for future in tqdm(concurrent.futures.as_completed(measured), "cells", len(measured), unit="cell"):
            path = measured[future]
            if error := future.exception():
                failures.append(f"experiments/ptq.py: error: {path.parent.name}, {path.stem}: {error}")
                continue
            found[path] = future.result()
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_json(path, found[path])
            write()
    write()
    print(page(record))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    app.run(main)
