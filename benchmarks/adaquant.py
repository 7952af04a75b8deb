"""How long does AdaQuant take on RepVGG-A0 at 224x224 with 256 images? python benchmarks/adaquant.py

Weights and images are random, since the time does not depend on them. Prints, and with --output writes as JSON, minutes
and the process's peak memory.
"""

import resource
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from tf_repvgg import fusion, provenance, storage
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import ptq

FLAGS = flags.FLAGS
flags.DEFINE_string("variant", "A0", "Variant of RepVGG.")
flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=32)
flags.DEFINE_integer("images", 256, "Number of calibration images.", lower_bound=1)
flags.DEFINE_integer("iterations", ptq.Options.iterations, "Steps per layer.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, such as results/adaquant_time.json.")


def main(_):
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    fused = fusion.fuse(build_repvgg(FLAGS.variant, shape, 1000))
    images = np.random.default_rng(0).uniform(-1, 1, (FLAGS.images, *shape)).astype(np.float32)
    started = time.monotonic()
    ptq.quantize(fused, "adaquant", 4, True, images, iterations=FLAGS.iterations, progress=True)
    record = {
        "variant": FLAGS.variant,
        "image_size": FLAGS.image_size,
        "calibration_images": FLAGS.images,
        "iterations": FLAGS.iterations,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": provenance.machine(),
    }
    for name in ("minutes", "peak_memory_mib"):
        print(f"{name.replace('_', ' ')}: {record[name]}")
    if FLAGS.output:
        storage.write_json(Path(FLAGS.output), record)


if __name__ == "__main__":
    app.run(main)
