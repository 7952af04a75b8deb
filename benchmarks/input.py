"""How many images per second does one core read, decode and augment? python benchmarks/input.py --photos=FOLDER

From a folder of photographs and from a TFDS dataset of the same files, which is written to a temporary folder first, at
224x224, on one core: the stages of the input of a training step, each with those before it. Ratios say how many cores
the input needs for each core that trains RepVGG-A0. Takes about five minutes.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import app, flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import provenance, storage
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.models import build_repvgg
from tf_repvgg.training import optimization

FLAGS = flags.FLAGS
flags.DEFINE_string("photos", None, "Folder of photographs, as --dataset=folder:PATH takes it.", required=True)
flags.DEFINE_integer("images", 512, "Images per measurement.", lower_bound=32)
flags.DEFINE_integer("rounds", 5, "Rounds in which every stage takes its turn.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write, such as results/input.json.")

SIZE, BATCH = (224, 224), 32
STEP = "training step of RepVGG-A0, batch 8"


def write_tfds(folder):
    """Writes the training images of the folder as a TFDS dataset, their files as they are."""
    import tensorflow_datasets as tfds  # slow to import

    paths = {split: sorted(Path(FLAGS.photos, split).glob("*/*")) for split in ("train", "test")}
    labels = sorted({path.parent.name for path in paths["train"]})

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "photos"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=labels),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for path in paths[split][:: max(1, len(paths[split]) // (4 * FLAGS.images))]:
                yield path.name, {"image": str(path), "label": path.parent.name}

    Photos(data_dir=folder).download_and_prepare()


def make_stages(name, data_dir):
    """{stage: function that makes its dataset of at least as many images as are measured}."""

    def load(**options):
        preprocessing = Preprocessing(SIZE, resize_shorter_side=256)
        return ClassificationData(name, data_dir, preprocessing, False, "random_resized", **options)

    plain, augmented = load(), load(rand_augment_operations=2)
    split = plain._images["train"]
    return {
        "read": lambda: (
            split.list_examples(shuffle_seed=0).map(lambda reference, _: split.read(reference)).batch(BATCH)
        ),
        "read, decode a window, resize, normalize": lambda: plain.training(BATCH, range(1)),
        "the same and RandAugment": lambda: augmented.training(BATCH, range(1)),
        "read, decode, resize, cut out the centre (evaluation)": lambda: split.images().batch(BATCH),
    }


def measure_images_per_second(make):
    """Images per second, after a first batch that fills the shuffle buffer."""
    batches = iter(make())
    next(batches)
    count = FLAGS.images // BATCH
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - started)


def make_step():
    """A function that returns images per second of a training step."""
    model = build_repvgg("A0", (*SIZE, 3), 1000)
    model.compile(optimization.make_optimizer(0.01, 10_000, 1), optimization.CrossEntropy(1000))
    images = np.random.default_rng(0).standard_normal([8, *SIZE, 3]).astype(np.float32)
    batches = iter(tf.data.Dataset.from_tensors((images, np.zeros(8, np.int64))).repeat())
    take_step = model.make_train_function()
    take_step(batches), take_step(batches)

    def measure():
        started = time.perf_counter()
        float(take_step(batches)["loss"])
        return 8 / (time.perf_counter() - started)

    return measure


def measure():
    """{source: {stage: [images per second]}}."""
    with tempfile.TemporaryDirectory() as folder:
        write_tfds(folder)
        photos = Path(FLAGS.photos).resolve()
        stages = {
            f"{source}: {stage}": make
            for source, arguments in {"folder": (f"folder:{photos}", None), "TFDS": ("photos", folder)}.items()
            for stage, make in make_stages(*arguments).items()
        }
        measures = {name: lambda make=make: measure_images_per_second(make) for name, make in stages.items()}
        measures[STEP] = make_step()
        speeds = {name: [] for name in measures}
        for turn in tqdm(range(FLAGS.rounds), leave=False):
            for name in np.roll(list(measures), turn):
                speeds[name].append(measures[name]())
    return speeds


def main(_):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before TensorFlow starts threads
    speeds = measure()
    rows = {}
    for name, values in speeds.items():
        ratios = np.divide(speeds[STEP], values)
        rows[name] = {
            "images_per_second_p50": round(float(np.median(values)), 1),
            "images_per_second": [round(value, 1) for value in values],
            "cores_per_training_core_p50": round(float(np.median(ratios)), 4),
        }
    cells = [(name, row["images_per_second_p50"], row["cores_per_training_core_p50"]) for name, row in rows.items()]
    print(tabulate(cells, ("one core", "images/s", "cores per core that trains"), tablefmt="github"))
    if FLAGS.output:
        report = {"machine": provenance.machine(), "seed": 0, "images": FLAGS.images, "stages": rows}
        storage.write_json(Path(FLAGS.output), report)


if __name__ == "__main__":
    app.run(main)
