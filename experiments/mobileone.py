"""Which quantization serves a network that others trained? python experiments/mobileone.py --data_dir=...

MobileOne-S0 with ImageNet's weights, quantized by each method at 8, 6 and 4 bits, per tensor and per channel, and
scored on photographs of the classes that calibration shows and of ten others, beside Google's ai-edge-quantizer.
--data_dir holds mobileone_s0/, imagenette2-224/ and imagewoof-val/ with their tables of labels. Settings are chosen
with --validation, which scores training photographs instead. Rows are measured one after another, each in a process of
its own with both cores. Resumable; writes results/mobileone.json and results/mobileone.md, with --validation
results/mobileone_validation.*. About four hours.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
from pathlib import Path

from absl import app, flags
from harness.commands import ROOT
from harness.mobileone import network
from harness.mobileone.page import render
from harness.mobileone.rows import FLOAT, SETS, Row, Settings, measure
from harness.ptq import ai_edge
from harness.ptq.cells import AI_EDGE
from harness.tables import write_results
from tqdm import tqdm

from tf_repvgg import cli, provenance
from tf_repvgg.quantization.ptq import Options, parse_method
from tf_repvgg.quantization.uniform import GRANULARITIES
from tf_repvgg.storage import FinishedWork

FLAGS = flags.FLAGS
RANGE_METHODS = ("min_max", "percentile", "mse", "octav", "relative")
CORRECTING_METHODS = (
    "equalize",
    "bias_correct",
    "dfq",
    "relative+bias_correct",
    "equalize+relative+bias_correct",
    "relative+mean_correct",
    "equalize+relative+mean_correct",
)
SLOW_METHODS = (
    *("adaround", "adaquant", "equalize+relative+adaquant", "class_impressions+equalize+relative+adaquant"),
    "codebook",
)
flags.DEFINE_string("data_dir", None, "Folder of the network and the photographs.")
flags.DEFINE_boolean("validation", False, "Whether to score training photographs, for choices.")
flags.DEFINE_list(
    "methods", [*RANGE_METHODS, *CORRECTING_METHODS, *SLOW_METHODS], "Methods, as of export/main.py --ptq."
)
flags.DEFINE_list("bits", ["8", "6", "4"], "Weight widths.")
flags.DEFINE_list("granularities", list(GRANULARITIES), "Granularities of weight scales.")
flags.DEFINE_list(
    "methods_int16", ["min_max", "relative"], "Methods that are measured with 16-bit activations too, int8 weights."
)
flags.DEFINE_boolean("ai_edge", True, "Whether to measure Google's toolkit beside our methods.")
flags.DEFINE_integer("calibration_images", 256, "Photographs that methods see.", lower_bound=1)
flags.DEFINE_integer("iterations", Options.iterations, "Steps for each layer of methods that learn.", lower_bound=1)
flags.DEFINE_integer("scored_images", None, "Photographs scored of each set; by default all.", lower_bound=1)
flags.DEFINE_string("kept", "runs/mobileone", "Folder of finished rows.")
flags.DEFINE_string("results", "results", "Folder of the table.")


def check_flags():
    """Raises ValueError for an unknown method, or FileNotFoundError if the network is missing."""
    for method in (*FLAGS.methods, *FLAGS.methods_int16):
        parse_method(method)
    if unknown := set(FLAGS.granularities) - set(GRANULARITIES):
        raise ValueError(f"--granularities has {unknown.pop()!r}; known: {', '.join(GRANULARITIES)}")
    if FLAGS.data_dir is None or not Path(FLAGS.data_dir, network.FILE).exists():
        raise FileNotFoundError(f"--data_dir is {FLAGS.data_dir!r}; it must name the folder that holds {network.FILE}")


def list_rows():
    """The rows in the order in which they are measured: the float network, then quick methods, then slow ones."""
    bits = [int(width) for width in FLAGS.bits]
    toolkit = [AI_EDGE + name for name in ("min_max", "octav")] if FLAGS.ai_edge else []
    rows = [Row(FLOAT)]
    for method in (*toolkit, *FLAGS.methods):
        widths = ai_edge.BITS if method in toolkit else bits
        rows += [Row(method, width, kind) for width in widths if width in bits for kind in FLAGS.granularities]
        if method in FLAGS.methods_int16 and 8 in bits:
            rows += [Row(method, 8, kind, 16) for kind in FLAGS.granularities]
    return rows


def measure_alone(row, settings, float_classes):
    """Measures a row in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, row, settings, float_classes).result()


def write(settings, results):
    """Writes the table of all rows that are measured; returns the page."""
    record = {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name != "data_dir"},
        "machine": provenance.machine(),
        "rows": [
            {key: value for key, value in result.items() if not key.endswith("_classes")}
            for result in results.values()
            if result is not None
        ],
    }
    page = render(record)
    write_results(ROOT / FLAGS.results, "mobileone_validation" if FLAGS.validation else "mobileone", record, page)
    return page


def main(_):
    with cli.bad_input_exits():
        check_flags()
    settings = Settings(
        FLAGS.data_dir, FLAGS.validation, FLAGS.calibration_images, FLAGS.iterations, FLAGS.scored_images
    )
    kept = FinishedWork(ROOT / FLAGS.kept / ("validation" if FLAGS.validation else "test"))
    results = {row: kept.find(row.name, settings.find_inputs(row)) for row in list_rows()}
    write(settings, results)
    float_classes, failures = None, []
    for row in tqdm(results, "rows", unit="row"):
        if results[row] is None:
            try:
                measured = measure_alone(row, settings, float_classes)
            except (ValueError, RuntimeError) as error:
                failures.append(f"experiments/mobileone.py: error: {row.name}: {error}")
                continue
            results[row] = kept.keep(row.name, settings.find_inputs(row), measured)
            write(settings, results)
        if row.method == FLOAT:
            float_classes = {name: results[row][f"{name}_classes"] for name in SETS}
    print(write(settings, results))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    app.run(main)
