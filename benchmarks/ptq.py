"""From a float network to a checked int8 file, beside ai-edge-quantizer: python benchmarks/ptq.py

MobileOne-S0 at 224x224 with random weights and images, since the time does not depend on them; 256 images for
calibration, weights per channel. The toolkits take turns, so that a busy machine slows all of them down alike. Prints,
and with --output writes as JSON, seconds and ratios to ai-edge-quantizer's min-max. About two minutes.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from side_by_side import compare_times
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import cli, fusion, provenance, storage, tflite
from tf_repvgg.models import build_network
from tf_repvgg.quantization import ptq

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
from harness.ptq import ai_edge

FLAGS = flags.FLAGS
flags.DEFINE_string("variant", "S0", "Variant of the network.")
flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=32)
flags.DEFINE_integer("images", 256, "Number of calibration images.", lower_bound=1)
flags.DEFINE_list("methods", ["min_max", "relative"], "Our methods, as of export/main.py --ptq.")
flags.DEFINE_integer("rounds", 3, "Files that each toolkit writes.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, with seconds and ratios.")

_PEER = "ai-edge-quantizer"


def check_flags():
    """Raises ValueError for an unknown method, or if ai-edge-quantizer is missing."""
    for method in FLAGS.methods:
        ptq.parse_method(method)
    if importlib.util.find_spec("ai_edge_quantizer") is None:
        raise ValueError(f"ai-edge-quantizer is not installed: {ai_edge.INSTALL}")


def write_file(name: str, model, images: np.ndarray) -> bytes:
    """The file of one of our methods, or of the other toolkit."""
    if name == _PEER:
        return ai_edge.quantize(tflite.convert_float(model), "min_max", 8, True, images)
    return tflite.convert(ptq.quantize(model, name, 8, True, images))


def main(_):
    with cli.bad_input_exits():
        check_flags()
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    model = fusion.fuse(build_network(FLAGS.variant, shape, 1000))
    images = np.random.default_rng(0).uniform(-1, 1, (FLAGS.images, *shape)).astype(np.float32)
    names = [_PEER, *FLAGS.methods]
    seconds = {name: [] for name in names}
    for name in names:
        write_file(name, model, images[:2])  # imports
    for turn in tqdm(range(FLAGS.rounds), desc="rounds"):
        for name in np.roll(names, turn):
            started = time.perf_counter()
            write_file(name, model, images)
            seconds[name].append(time.perf_counter() - started)
    ratios = compare_times(seconds, _PEER)
    print(
        tabulate(
            [[name, f"{statistics.median(seconds[name]):.1f}", f"{ratios[name][0]:.2f}"] for name in names],
            ["", "seconds", "ratio"],
            disable_numparse=True,
        )
    )
    if FLAGS.output:
        record = {
            "variant": FLAGS.variant,
            "image_size": FLAGS.image_size,
            "calibration_images": FLAGS.images,
            "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            "ratios": ratios,
            "machine": provenance.machine(),
        }
        storage.write_json(Path(FLAGS.output), record)


if __name__ == "__main__":
    app.run(main)
