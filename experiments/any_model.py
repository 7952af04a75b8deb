"""Which Keras models become integer files, and are the files right? python experiments/any_model.py --data_dir=...

Two parts. Random small models of a few dozen kinds of layers, drawn from their seeds, go every way to a file; each ends
right, or refused before any work, and everything else is a fault. Then networks of keras.applications with random
weights: how often their files agree with the float network, beside TensorFlow's own int8 files. An hour or two
for each part on one core. --norandom or --noapplications leaves one part as it is in results/any_model.json. Resumable;
writes results/any_model.json and results/any_model.md. Exit status 1 if there is a fault.
"""

import sys
from pathlib import Path

from absl import app, flags
from harness.any_model import applications, sweep
from harness.any_model.page import list_faults, render
from harness.commands import ROOT
from harness.results.sources import read_json
from harness.tables import write_results
from tqdm import tqdm

from tf_repvgg import cli, provenance
from tf_repvgg.storage import FinishedWork

FLAGS = flags.FLAGS
flags.DEFINE_boolean("random", True, "Whether to judge random models.")
flags.DEFINE_boolean("applications", True, "Whether to measure networks of keras.applications.")
flags.DEFINE_integer("models", 2000, "Number of random models.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the first random model; the others follow.", lower_bound=0)
flags.DEFINE_integer("ways", 1, "Number of ways to a file that each random model takes.", lower_bound=1)
flags.DEFINE_string("data_dir", None, "Folder with the folders train and test of photographs, as Imagenette has them.")
flags.DEFINE_list("networks", list(applications.NETWORKS), "Names in keras.applications.")
flags.DEFINE_integer("calibration_images", 32, "Photographs for normalizations and calibration.", lower_bound=1)
flags.DEFINE_integer("test_images", 200, "Photographs on which files and networks are compared.", lower_bound=1)
flags.DEFINE_string("kept", "runs/any_model", "Folder of finished parts of the work.")
flags.DEFINE_string("results", "results", "Folder of the results.")


def judge_random_models(kept):
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.models)
    records = sweep.judge_seeds(seeds, FLAGS.ways, kept)
    return {"first_seed": FLAGS.seed, "ways_per_model": FLAGS.ways, **sweep.summarize(records)}


def measure_applications(kept):
    with cli.bad_input_exits():
        if FLAGS.data_dir is None:
            raise ValueError("--data_dir is missing; it names a folder of photographs, or --noapplications needs none")
        counts = {"train": FLAGS.calibration_images, "test": FLAGS.test_images}
        calibration, photographs = (
            applications.load_photographs(Path(FLAGS.data_dir, part), count) for part, count in counts.items()
        )
    inputs = {**counts, "sources_sha256": sweep.hash_sources()}
    networks = {}
    for name in tqdm(FLAGS.networks, "keras.applications", unit="network"):
        result = kept.find(f"applications/{name}", inputs)
        if result is None:
            measured = applications.measure(name, calibration, photographs)
            result = kept.keep(f"applications/{name}", inputs, measured)
        networks[name] = {key: value for key, value in result.items() if key not in inputs}
    return {"calibration_images": counts["train"], "test_images": counts["test"], "networks": networks}


def main(_):
    path = ROOT / FLAGS.results / "any_model.json"
    record = read_json(path) if path.exists() else {}
    kept = FinishedWork(ROOT / FLAGS.kept)
    if FLAGS.random:
        record["random"] = judge_random_models(kept) | {"machine": provenance.machine()}
    if FLAGS.applications:
        record["applications"] = measure_applications(kept) | {"machine": provenance.machine()}
    write_results(ROOT / FLAGS.results, "any_model", record, render(record))
    print(render(record))
    if faults := list_faults(record):
        sys.exit("\n".join(f"experiments/any_model.py: fault: {fault}" for fault in faults))


if __name__ == "__main__":
    app.run(main)
