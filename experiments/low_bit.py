"""How few weight clusters does ClusterQAT need, beside LSQ and tfmot? python experiments/low_bit.py --data_dir=...

Fine-tunes CIFAR-10 models for three epochs each. Learning rates, from the same grid for every method, and whether to
distill are chosen on held-out images with a model that has not seen them; then everything is trained on the 50,000
images and tested once. Starts from the checkpoints in results/checkpoints where they exist. About 10 hours on 2 cores.
Resumable at any point, on another machine too: results/low_bit holds each fine-tuning that has ended, with the images
that it gets right. Writes results/low_bit.json and results/low_bit.md, as far as it has come, and in the end
results/low_bit.png.
"""

import itertools

from absl import app, flags
from harness.commands import ROOT, train
from harness.low_bit import figure, page
from harness.low_bit.fine_tunings import FineTunings
from harness.low_bit.learning_rates import Choices
from harness.low_bit.methods import REMEDIES, VARIANTS
from harness.low_bit.models import OABN_MODELS, OTHER_MODELS, VALIDATION_MODEL
from harness.low_bit.rows import Rows
from harness.tables import write_results

from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/low_bit", "Folder of the fine-tuning runs.")

HEADLINE = (  # clusters, granularity, target: largest drop in points
    (16, "per_tensor", 0.1),
    (8, "per_tensor", 0.3),
    (8, "per_channel", 0.2),
    (6, "per_tensor", 0.6),
    (5, "per_tensor", 1.0),
    (4, "per_tensor", 2.0),
    (4, "per_channel", 1.0),
    (3, "per_channel", 3.0),
)


def train_base(config):
    """Makes sure that a float run is there; returns its workdir."""
    workdir = f"runs/cifar10/{config}"
    train(config, workdir, data_dir=FLAGS.data_dir)
    return workdir


def measure(rows, choices, record, write):
    """Fills the record row by row, and writes it after each."""

    def add(part, models, method, clusters, granularity, **options):
        record[part].append(rows.make(models, method, clusters, granularity, **options))
        write()

    def compare(method, clusters, granularity):
        choices.compare(method, clusters, granularity)
        write()

    for clusters, granularity, target in HEADLINE:
        add("headline", OABN_MODELS, "ClusterQAT", clusters, granularity, target=target)
    for clusters, granularity in itertools.product((16, 8, 4), GRANULARITIES):
        for method in ("ClusterQAT", "LSQ", "tfmot"):
            add("peers", OABN_MODELS, method, clusters, granularity, with_lead=True)
    common_rate = choices.find_rate("ClusterQAT", 8, "per_tensor")
    add("common_rate", OABN_MODELS, "ClusterQAT", 16, "per_channel", rate=common_rate)
    for clusters, granularity in itertools.product((8, 4), GRANULARITIES):
        add("edges", ["OABN"], "ClusterQAT", clusters, granularity, edge_clusters=256)
    for model, clusters in itertools.product(OTHER_MODELS, (8, 4)):
        add("others", [model], "ClusterQAT", clusters, "per_tensor")
    for clusters in (16, 8, 4):
        compare("ClusterQAT", clusters, "per_channel")
    for method, clusters in itertools.product(VARIANTS, (4, 8)):
        compare(method, clusters, "per_tensor")
    for method in REMEDIES:
        compare(method, 16, "per_channel")


def main(_):
    results = ROOT / "results"
    fine_tunings = FineTunings(results / "low_bit", FLAGS.runs, FLAGS.data_dir)
    choices = Choices(fine_tunings, train_base(VALIDATION_MODEL))
    bases = {name: train_base(config) for name, config in (OABN_MODELS | OTHER_MODELS).items()}
    record = {"choices": choices.as_record(), **{part: [] for part in page.PARTS}}
    measure(
        Rows(fine_tunings, choices, bases),
        choices,
        record,
        write=lambda: write_results(results, "low_bit", record, page.render(record)),
    )
    figure.draw(record, results / "low_bit.png")
    print(page.render(record))


if __name__ == "__main__":
    app.run(main)
