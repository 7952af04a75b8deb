"""What do levels fitted to each layer gain over uniform ones at the same cost? python experiments/fit.py --data_dir=...

Chooses numbers of clusters for each layer at the file size of uniform codebooks, for TFLite Micro with tables, and for
Ethos-U at their size and time; quantizes, and runs every file over all test images in LiteRT. Takes the trained models
in results/checkpoints. Resumable: each cell is measured once and kept in results/fit; results/fit.json and
results/fit.md hold all cells that there are. Cells with learning take a minute each on two idle cores.
"""

import dataclasses
import resource
import time

from absl import app, flags, logging
from harness.commands import CHECKPOINTS, ROOT
from harness.fit.cells import WAYS, Cell, compare_with_sums, load_fitter, measure
from harness.fit.page import render
from harness.ptq.cells import Settings
from harness.tables import write_results
from tqdm import tqdm

from tf_repvgg import cli, provenance
from tf_repvgg.quantization.fitting import FIT_METHODS
from tf_repvgg.quantization.ptq import METHODS, Options
from tf_repvgg.storage import FinishedWork

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with the dataset; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/fit", "Folder of the damages, which are kept while sources stay the same.")
flags.DEFINE_string("results", "results", "Folder of the table; its folder fit keeps the cells.")
flags.DEFINE_list("models", ["cifar10_oabn", "cifar10_bn"], "Names of folders in results/checkpoints.")
flags.DEFINE_list("methods", ["codebook", "codebook_adaquant"], "Methods, as of export/main.py --ptq.")
flags.DEFINE_list("clusters", ["4", "3", "6", "8", "16"], "Uniform numbers of clusters whose costs are the budgets.")
flags.DEFINE_bool("ethos_u", True, "Whether to fit for Ethos-U55-128 too, without learning.")
flags.DEFINE_integer("calibration_images", 512, "Training images that methods and searches see.", lower_bound=1)
flags.DEFINE_integer("test_images", None, "Number of test images; by default all.", lower_bound=1)
flags.DEFINE_integer("iterations", Options.iterations, "Steps per layer of methods that learn.", lower_bound=1)
flags.DEFINE_integer("assignments", 100, "Random assignments whose errors are compared with sums.", lower_bound=2)

# Methods that learn take a minute a file; how much the local search adds is measured without learning.
LEARNED_WAYS = ("uniform", "fitted", "ends", "greedy")
ETHOS_U = "ethos_u55_128"
ETHOS_U_CLUSTERS = (4, 16)


def list_cells():
    """Cells in the order in which they are measured: by number of clusters, the uniform one of each budget first."""
    codebooks = {
        number: [
            Cell(model, str(CHECKPOINTS / model), "tflm_lut", method, number, way)
            for method in FLAGS.methods
            for model in FLAGS.models
            for way in (LEARNED_WAYS if METHODS[method].learns else WAYS)
        ]
        for number in map(int, FLAGS.clusters)
    }
    ethos_u = [
        Cell(FLAGS.models[0], str(CHECKPOINTS / FLAGS.models[0]), ETHOS_U, "codebook", number, way, field)
        for field in ("file_bytes", "time_ms")
        for number in ETHOS_U_CLUSTERS
        for way in ("uniform", "fitted")
    ]
    first, *others = codebooks.values()
    return [*first, *ethos_u * FLAGS.ethos_u, *(cell for cells in others for cell in cells)]


def measure_correlations(settings, kept):
    """{model: sums of damages beside errors, time and memory}."""
    correlations = {}
    for model in FLAGS.models:
        inputs = {"settings": dataclasses.asdict(settings) | {"data_dir": None}, "assignments": FLAGS.assignments}
        if (result := kept.find(f"{model}/correlation", inputs)) is None:
            started = time.monotonic()
            fitter = load_fitter(str(CHECKPOINTS / model), "tflm_lut", "codebook", settings, None)
            seconds = time.monotonic() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            content = compare_with_sums(fitter, FLAGS.assignments)
            content |= {"seconds_for_damages": seconds, "peak_memory_gib": peak}
            result = kept.keep(f"{model}/correlation", inputs, content)
        correlations[model] = result
    return correlations


def write(record, results):
    """Writes the record with the cells that there are."""
    record["cells"] = [result for result in results.values() if result]
    write_results(ROOT / FLAGS.results, "fit", record, render(record))


def main(_):
    logging.set_verbosity(logging.ERROR)  # TFDS logs every file that it opens
    with cli.bad_input_exits():
        if unknown := [method for method in FLAGS.methods if FIT_METHODS.get(method) != "codebook"]:
            raise ValueError(f"--methods holds {unknown[0]!r}; this experiment compares codebooks")
    settings = Settings(FLAGS.data_dir, FLAGS.calibration_images, FLAGS.test_images, FLAGS.iterations)
    kept = FinishedWork(ROOT / FLAGS.results / "fit")
    record = {
        "models": FLAGS.models,
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key != "data_dir"},
        "machine": provenance.machine(),
        "correlations": measure_correlations(settings, kept),
    }
    cells = list_cells()
    results = {cell: kept.find(cell.name, cell.find_inputs(settings)) for cell in cells}
    for cell in tqdm([cell for cell in cells if results[cell] is None], "cells", unit="cell"):
        uniform = results.get(dataclasses.replace(cell, way="uniform"))
        budget = uniform["measured"][cell.field] if uniform else None
        result = measure(cell, settings, budget, ROOT / FLAGS.runs)
        results[cell] = kept.keep(cell.name, cell.find_inputs(settings), result)
        write(record, results)
    write(record, results)
    print(render(record))


if __name__ == "__main__":
    app.run(main)
