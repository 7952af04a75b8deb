"""What the check of a file against its quantized model costs, as a share of convert: python benchmarks/verification.py

Float networks with random weights, 128 calibration images; every part of `convert` is timed in the same run. About two
minutes.
"""

import time

import numpy as np
import tf_keras as keras
from absl import app, flags
from tabulate import tabulate

from tf_repvgg import fusion, provenance, storage, tflite
from tf_repvgg.models import build_repvgg
from tf_repvgg.tflite.verification import make_samples, verify
from tf_repvgg.tflite.weights import with_weights

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "Conversions of each network.", lower_bound=1)
flags.DEFINE_integer("images", 128, "Calibration images.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, such as results/verification.json.")

NETWORKS = {
    "digits, 8 px": lambda: build_repvgg("digits", (8, 8, 1), 10),
    "cifar-s, 32 px": lambda: build_repvgg("cifar-s", (32, 32, 3), 10),
    "RepVGG-A0, 96 px": lambda: build_repvgg("A0", (96, 96, 3), 10),
    "MobileNetV2, 96 px": lambda: keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10),
}


def time_parts(model: keras.Model, images: np.ndarray) -> tuple[float, float]:
    """Seconds of `convert` without the check, and of the check."""
    started = time.perf_counter()
    calibrated = tflite.calibrate(model, images)
    file = with_weights(calibrated.content, calibrated.model)
    converted = time.perf_counter()
    verify(file, calibrated.model, make_samples(calibrated.model, calibrated.input_shapes))
    return converted - started, time.perf_counter() - converted


def main(_):
    record = {"machine": provenance.machine(), "rounds": FLAGS.rounds, "images": FLAGS.images, "networks": {}}
    rows = []
    for name, make in NETWORKS.items():
        model = fusion.fuse(make())
        images = np.random.default_rng(0).uniform(-1, 1, (FLAGS.images, *model.input_shape[1:])).astype(np.float32)
        times = np.array([time_parts(model, images) for _ in range(FLAGS.rounds)])
        converting, checking = np.median(times, axis=0)
        share = float(np.median(times[:, 1] / times.sum(axis=1)))
        record["networks"][name] = {
            "convert_seconds": round(float(converting + checking), 2),
            "check_seconds": round(float(checking), 2),
            "check_share_percent": round(100 * share, 1),
        }
        rows.append([name, f"{converting + checking:.2f}", f"{checking:.2f}", f"{100 * share:.1f}"])
    print(tabulate(rows, ["network", "convert s", "of it check s", "check %"]))
    if FLAGS.output:
        storage.write_json(FLAGS.output, record)


if __name__ == "__main__":
    app.run(main)
