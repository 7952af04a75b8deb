"""Which limit k of OABN serves a codebook best? python experiments/codebook_limit.py --data_dir=...

Trains the CIFAR-10 model as experiments/clip_limit.py does, for every k on validation data, and fine-tunes each for an
epoch of ClusterQAT with 8 and with 4 clusters per tensor, distilled from itself. One seed cannot distinguish
neighbouring limits: the best two and the k of the config are trained with two more seeds. About 80 minutes on 2 cores.
Resumable at any point, on another machine too: results/codebook_limit holds each training that has ended. Writes
results/codebook_limit.json and results/codebook_limit.md, as far as it has come.
"""

import itertools

from absl import app, flags
from harness.commands import ROOT
from harness.oabn_limit import codebook_page
from harness.oabn_limit.candidates import CONFIG, LIMITS
from harness.oabn_limit.codebook_trainings import (
    CLUSTERS,
    FINAL_SEEDS,
    FINE_TUNING,
    Trainings,
    choose,
    pick_finalists,
)
from harness.tables import write_results

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/clip_limit", "Folder of the training runs.")
flags.DEFINE_integer("epochs", 4, "Epochs of every training; the final models train longer.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 3, "Number of these epochs that train on small crops.", lower_bound=0)


def main(_):
    results = ROOT / "results"
    schedule = {"epochs": FLAGS.epochs, "early_epochs": FLAGS.early_epochs}
    trainings = Trainings(results / "codebook_limit", FLAGS.runs, schedule, FLAGS.data_dir)
    record = {
        "config": f"configs/{CONFIG}.flags",
        **schedule,
        "fine_tuning": FINE_TUNING,
        "split": "validation",
        "machine": None,
        "trainings": [],
    }

    def measure(k, seed):
        training = trainings.measure(k, seed)
        record["machine"] = training["machine"]
        record["trainings"].append({key: training[key] for key in ("oabn_k", "seed", "float", *CLUSTERS)})
        record["chosen"] = choose(record["trainings"])
        write_results(results, "codebook_limit", record, codebook_page.render(record))

    for k in LIMITS:
        measure(k, 0)
    for seed, k in itertools.product(FINAL_SEEDS, pick_finalists(record["trainings"])):
        measure(k, seed)
    print(codebook_page.render(record))


if __name__ == "__main__":
    app.run(main)
