"""RepVGG-A0 at 224 in LiteRT, file against file: python benchmarks/inference.py --output=results/inference.json

Weights are random, which costs what trained ones cost. Files take turns, each in a process of its own, as in
export/benchmark.py; ratios are medians over the turns of one run. Last, LiteRT's own `litert-benchmark` and
export/benchmark.py's way of timing take turns on two of the files.
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
from tf_repvgg.tflite.isolated import Isolated, interleaved_times

FLAGS = flags.FLAGS
flags.DEFINE_string("variant", "A0", "Of RepVGG.")
flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=8)
flags.DEFINE_integer("threads", 2, "Interpreter threads.", lower_bound=1)
flags.DEFINE_integer("turns", 40, "Turns of each file.", lower_bound=3)
flags.DEFINE_integer("runs_per_turn", 10, "Inferences in a turn.", lower_bound=1)
flags.DEFINE_integer(
    "slow_turns", 5, "Turns, of one inference, of files that LiteRT has no fast kernels for.", lower_bound=1
)
flags.DEFINE_integer("compared_turns", 5, "Turns of each file beside litert-benchmark.", lower_bound=1)
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
# Of what LiteRT computes a thousand times slower, a few inferences tell enough.
SLOW = ("int4", "int8")
# (key, numerator, denominator, what to expect)
RATIOS = (
    ("float_over_int8", "float", "int8", "at least 5 with 2 threads"),
    ("int8_over_vgg_int8", "int8", "vgg_int8", "1 within 3 %"),
    ("unfused_over_fused_float", "unfused_float", "float", ""),
    ("unfused_over_fused_int8", "unfused_int8", "int8", ""),
    ("int4_over_int8", "int4", "int8", ""),
)


def plain_vgg(fused):
    """The network of 3x3 convolutions that anyone would write down, with new random weights."""
    convolutions = [layer for layer in fused.layers if isinstance(layer, keras.layers.Conv2D)]
    return keras.Sequential(
        [keras.Input(fused.input_shape[1:])]
        + [keras.layers.Conv2D(its.filters, 3, its.strides, padding="same", activation="relu") for its in convolutions]
        + [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(fused.output_shape[-1])]
    )


def by_tensorflow(model, images=None):
    """TensorFlow's own conversion, float or with images int8, batch 1."""
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
        "float": lambda: by_tensorflow(fused),
        "int8": lambda: tflite.convert(fused, images),
        "int4": lambda: targets.TARGETS["litert_int4"](tflite.convert(fused, images, weight_bits=4)).files[
            "_int4.tflite"
        ],
        "vgg_int8": lambda: by_tensorflow(plain_vgg(fused), images),
        "unfused_float": lambda: by_tensorflow(model),
        "unfused_int8": lambda: by_tensorflow(model, images),
    }
    return {name: builders[name]() for name in tqdm(FILES, desc="writing files", leave=False)}


def measure(files):
    """(rows by file, ratios) of all files side by side."""
    with contextlib.ExitStack() as stack:
        isolated = {name: stack.enter_context(Isolated(name, file, FLAGS.threads)) for name, file in files.items()}
        costs = {name: file.costs() for name, file in isolated.items()}
        slow = interleaved_times({name: isolated[name] for name in SLOW}, FLAGS.slow_turns, 1, runs_per_turn=1)
        fast = {name: isolated[name] for name in files if name == SLOW[-1] or name not in SLOW}
        times = interleaved_times(fast, FLAGS.turns * FLAGS.runs_per_turn, runs_per_turn=FLAGS.runs_per_turn)
    turns = {name: np.median(np.reshape(its, [-1, FLAGS.runs_per_turn]), axis=1) for name, its in times.items()}
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
        median, *quartiles = side_by_side.ratios(compared, denominator)[numerator]
        ratios[key] = {"median": median, "quartiles": quartiles, "expected": expected}
    return rows, ratios


def tool_path():
    """Where litert-benchmark is: beside this Python, or on the PATH; None if it is nowhere."""
    beside = Path(sys.executable).parent / TOOL
    return str(beside) if beside.exists() else shutil.which(TOOL)


def tool_median(tool, path, result):
    """What the tool finds for a file: median milliseconds.

    Raises:
      ValueError: if it fails.
    """
    words = {"model": path, "num_threads": FLAGS.threads, "num_runs": FLAGS.runs_per_turn * 5, "warmup_runs": 10}
    command = [tool, *(f"--{name}={value}" for name, value in words.items()), f"--result_json={result}"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode or not result.exists():
        lines = (outcome.stdout + outcome.stderr).strip().splitlines()
        raise ValueError(f"{TOOL} failed: {lines[-1] if lines else 'it said nothing'}")
    return json.loads(result.read_text())["latency"]["median_ms"]


def compare_with_tool(files):
    """{file: our median, the tool's, their ratio}, or {"skipped": why}."""
    if (tool := tool_path()) is None:
        return {"skipped": f"{TOOL} is not installed; it comes with ai-edge-litert"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("float", "int8"):
            path = Path(folder) / f"{name}.tflite"
            path.write_bytes(files[name])
            ours, theirs = [], []
            with Isolated(name, files[name], FLAGS.threads) as isolated:
                isolated.times(20)
                for _ in tqdm(range(FLAGS.compared_turns), desc=f"{name} by {TOOL}", leave=False):
                    ours.append(float(np.median(isolated.times(FLAGS.runs_per_turn * 5))))
                    theirs.append(tool_median(tool, path, Path(folder) / "result.json"))
            found[name] = {
                "ours_ms_p50": round(float(np.median(ours)), 3),
                "litert_benchmark_ms_p50": round(float(np.median(theirs)), 3),
                "ours_over_litert_benchmark": round(float(np.median(np.divide(ours, theirs))), 4),
            }
    return found


def print_tables(report):
    size = FLAGS.image_size
    print(f"\nRepVGG-{FLAGS.variant}, {size}x{size}, {FLAGS.threads} threads, LiteRT with XNNPACK\n")
    rows = [
        [name, row["what"], row["latency_ms_p50"], row["latency_ms_p90"], row["macs"], row["file_bytes"]]
        for name, row in report["files"].items()
    ]
    print(tabulate(rows, ["file", "what it is", "p50 ms", "p90 ms", "MACs", "bytes"], tablefmt="github", intfmt=","))
    rows = [
        [key.replace("_", " "), its["median"], "{:.3f} .. {:.3f}".format(*its["quartiles"]), its["expected"]]
        for key, its in report["ratios"].items()
    ]
    print("\n" + tabulate(rows, ["ratio", "median", "quartiles", "expected"], tablefmt="github", floatfmt=".3f"))
    compared = report["beside_litert_benchmark"]
    if "skipped" in compared:
        print(f"\nnot compared with {TOOL}: {compared['skipped']}")
        return
    rows = [[name, *its.values()] for name, its in compared.items()]
    headers = ["file", "ours, ms", f"{TOOL}, ms", "ratio (1 within 15 %)"]
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


def main(_):
    files = make_files()
    rows, ratios = measure(files)
    try:
        compared = compare_with_tool(files)
    except ValueError as error:  # the tool's own failure is no reason to lose what was measured before
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
