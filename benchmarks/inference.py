"""How fast is RepVGG-A0 at 224 in LiteRT, file by file? python benchmarks/inference.py --output=results/inference.json

Weights are random, which take as long as trained ones. Files take turns, each in a process of its own, as in
export/benchmark.py; ratios are medians over the turns of one run. Last, LiteRT's own `litert-benchmark` and the timing
of export/benchmark.py take turns on two of the files.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import side_by_side
import tensorflow as tf
import tf_keras as keras
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import fusion, native_output, provenance, storage, tflite
from tf_repvgg.models import build_repvgg
from tf_repvgg.tflite import targets
from tf_repvgg.tflite.isolated import Isolated, time_by_turns

FLAGS = flags.FLAGS
flags.DEFINE_string("variant", "A0", "Variant of RepVGG.")
flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=8)
flags.DEFINE_integer("threads", 2, "Interpreter threads.", lower_bound=1)
flags.DEFINE_integer("turns", 40, "Number of turns of each file.", lower_bound=3)
flags.DEFINE_integer("runs_per_turn", 10, "Number of inferences in a turn.", lower_bound=1)
flags.DEFINE_integer(
    "slow_turns", 5, "Number of turns, of one inference, of files without fast kernels in LiteRT.", lower_bound=1
)
flags.DEFINE_integer("compared_turns", 5, "Number of turns of each file beside litert-benchmark.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, such as results/inference.json.")

CALIBRATION_IMAGES = 8
TOOL = "litert-benchmark"
FILES = {
    "float": "fused, float",
    "int8": "fused, int8",
    "int4": "fused, weights stored in 4 bits",
    "vgg_int8": "plain Keras model of the same convolutions, TensorFlow's own int8 PTQ",
    "unfused_float": "training form converted as it is, float",
    "unfused_int8": "training form converted as it is, TensorFlow's own int8 PTQ",
}
# LiteRT has no fast kernels for 4 bits: a few inferences suffice, and as many of the file that it is compared with.
SLOW = ("int4", "int8")
# (key, numerator, denominator, expected value)
RATIOS = (
    ("float_over_int8", "float", "int8", "at least 5 with 2 threads"),
    ("int8_over_vgg_int8", "int8", "vgg_int8", "1 within 3 %"),
    ("unfused_over_fused_float", "unfused_float", "float", ""),
    ("unfused_over_fused_int8", "unfused_int8", "int8", ""),
    ("int4_over_int8", "int4", "int8", ""),
)


def make_plain_vgg(fused):
    """The same 3x3 convolutions written down by hand, with new random weights."""
    convolutions = [
        keras.layers.Conv2D(layer.filters, 3, layer.strides, padding="same", activation="relu")
        for layer in fused.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(fused.output_shape[-1])]
    return keras.Sequential([keras.Input(fused.input_shape[1:]), *convolutions, *head])


def convert_by_tensorflow(model, images=None):
    """TensorFlow's own conversion with batch 1: int8 if calibration images are given, else float."""
    function = tf.function(lambda image: model(image, training=False)).get_concrete_function(
        tf.TensorSpec((1, *model.input_shape[1:]), tf.float32)
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model)
    if images is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[np.newaxis]] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    with native_output.hide():
        return converter.convert()


def make_files():
    """{key of FILES: bytes}."""
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    images = np.random.default_rng(0).uniform(-1, 1, (CALIBRATION_IMAGES, *shape)).astype(np.float32)
    model = build_repvgg(FLAGS.variant, shape, 1000)
    fused = fusion.fuse(model)
    builders = {
        "float": lambda: convert_by_tensorflow(fused),
        "int8": lambda: tflite.convert(fused, images),
        "int4": lambda: targets.TARGETS["litert_int4"](tflite.convert(fused, images, weight_bits=4)).files[
            "_int4.tflite"
        ],
        "vgg_int8": lambda: convert_by_tensorflow(make_plain_vgg(fused), images),
        "unfused_float": lambda: convert_by_tensorflow(model),
        "unfused_int8": lambda: convert_by_tensorflow(model, images),
    }
    return {name: builders[name]() for name in tqdm(FILES, desc="writing files", leave=False)}


def measure(files):
    """Times all files side by side; returns their rows by file, and the ratios."""
    with contextlib.ExitStack() as stack:
        isolated = {name: stack.enter_context(Isolated(name, file, FLAGS.threads)) for name, file in files.items()}
        costs = {name: file.costs() for name, file in isolated.items()}
        slow = time_by_turns({name: isolated[name] for name in SLOW}, FLAGS.slow_turns, 1, runs_per_turn=1)
        fast = {name: isolated[name] for name in files if name == SLOW[-1] or name not in SLOW}
        times = time_by_turns(fast, FLAGS.turns * FLAGS.runs_per_turn, runs_per_turn=FLAGS.runs_per_turn)
    turns = {name: np.median(np.reshape(ms, [-1, FLAGS.runs_per_turn]), axis=1) for name, ms in times.items()}
    times = slow | times
    rows = {
        name: {
            "what": FILES[name],
            "file_bytes": len(files[name]),
            "macs": costs[name].macs,
            "latency_ms_p50": round(float(np.median(times[name])), 3),
            "latency_ms_p90": round(float(np.percentile(times[name], 90)), 3),
        }
        for name in files
    }
    ratios = {}
    for key, numerator, denominator, expected in RATIOS:
        compared = slow if numerator in SLOW and denominator in SLOW else turns
        median, *quartiles = side_by_side.compare_times(compared, denominator)[numerator]
        ratios[key] = {"median": median, "quartiles": quartiles, "expected": expected}
    return rows, ratios


def find_tool():
    """Path of litert-benchmark: beside this Python, or on the PATH; None if it is not installed."""
    beside = Path(sys.executable).parent / TOOL
    return str(beside) if beside.exists() else shutil.which(TOOL)


def time_by_tool(tool, path, result):
    """Median milliseconds of a file, by the tool.

    Raises:
      ValueError: If the tool fails.
    """
    options = {"model": path, "num_threads": FLAGS.threads, "num_runs": FLAGS.runs_per_turn * 5, "warmup_runs": 10}
    command = [tool, *(f"--{name}={value}" for name, value in options.items()), f"--result_json={result}"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode or not result.exists():
        lines = (outcome.stdout + outcome.stderr).strip().splitlines()
        raise ValueError(f"{TOOL} failed: {lines[-1] if lines else 'it printed nothing'}")
    return json.loads(result.read_text())["latency"]["median_ms"]


def compare_with_tool(files):
    """{file: our median, the tool's median, their ratio}, or {"skipped": reason}."""
    if (tool := find_tool()) is None:
        return {"skipped": f"{TOOL} is not installed; it comes with ai-edge-litert"}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("float", "int8"):
            path = Path(folder) / f"{name}.tflite"
            path.write_bytes(files[name])
            own_medians, tool_medians = [], []
            with Isolated(name, files[name], FLAGS.threads) as isolated:
                isolated.times(20)
                for _ in tqdm(range(FLAGS.compared_turns), desc=f"{name} by {TOOL}", leave=False):
                    own_medians.append(float(np.median(isolated.times(FLAGS.runs_per_turn * 5))))
                    tool_medians.append(time_by_tool(tool, path, Path(folder) / "result.json"))
            rows[name] = {
                "ours_ms_p50": round(float(np.median(own_medians)), 3),
                "litert_benchmark_ms_p50": round(float(np.median(tool_medians)), 3),
                "ours_over_litert_benchmark": round(float(np.median(np.divide(own_medians, tool_medians))), 4),
            }
    return rows


def print_tables(report):
    size = FLAGS.image_size
    print(f"\nRepVGG-{FLAGS.variant}, {size}x{size}, {FLAGS.threads} threads, LiteRT with XNNPACK\n")
    rows = [
        [name, row["what"], row["latency_ms_p50"], row["latency_ms_p90"], row["macs"], row["file_bytes"]]
        for name, row in report["files"].items()
    ]
    print(tabulate(rows, ["file", "description", "p50 ms", "p90 ms", "MACs", "bytes"], tablefmt="github", intfmt=","))
    rows = [
        [key.replace("_", " "), ratio["median"], "{:.3f} .. {:.3f}".format(*ratio["quartiles"]), ratio["expected"]]
        for key, ratio in report["ratios"].items()
    ]
    print("\n" + tabulate(rows, ["ratio", "median", "quartiles", "expected"], tablefmt="github", floatfmt=".3f"))
    compared = report["beside_litert_benchmark"]
    if "skipped" in compared:
        print(f"\nnot compared with {TOOL}: {compared['skipped']}")
        return
    rows = [[name, *times.values()] for name, times in compared.items()]
    headers = ["file", "ours, ms", f"{TOOL}, ms", "ratio (1 within 15 %)"]
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


def main(_):
    files = make_files()
    rows, ratios = measure(files)
    try:
        compared = compare_with_tool(files)
    except ValueError as error:  # a failure of the tool must not lose the measurements of the files
        compared = {"skipped": str(error)}
    report = {
        "machine": provenance.machine(),
        "variant": FLAGS.variant,
        "image_size": FLAGS.image_size,
        "threads": FLAGS.threads,
        "turns": FLAGS.turns,
        "runs_per_turn": FLAGS.runs_per_turn,
        "files": rows,
        "ratios": ratios,
        "beside_litert_benchmark": compared,
    }
    print_tables(report)
    if FLAGS.output:
        storage.write_json(Path(FLAGS.output), report)


if __name__ == "__main__":
    app.run(main)
