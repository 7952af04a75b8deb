"""What does min-max quantization do to each kind of RepVGG? python experiments/min_max.py --data_dir=...

The question of the paper on CIFAR-10: trains configs/cifar10_*.flags on all 50,000 images (up to 28 minutes each on 2
cores), exports every weight width, and tests once. Resumable; starts from the checkpoints in results/checkpoints where
they exist. Writes results/min_max.json and results/min_max.md.
"""

from absl import app, flags
from harness.commands import ROOT, export, train
from harness.pages.min_max import BITS, render
from harness.tables import write_results

from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_boolean("without_penalty", False, "Adds two rows: BN and OABN without --merged_weight_decay.")

MODELS = {
    "BN": "cifar10_bn",
    "OABN": "cifar10_oabn",
    "QARepVGG": "cifar10_qarepvgg",
    "no identity branch": "cifar10_no_identity",
    "constant identity gain": "cifar10_constant",
}
WITHOUT_PENALTY = {"BN, no penalty": "cifar10_bn_no_penalty", "OABN, no penalty": "cifar10_oabn_no_penalty"}


def measure(config):
    """Trains and exports one model; returns its part of the record."""
    workdir = f"{FLAGS.runs}/{config}"
    training = train(config, workdir, data_dir=FLAGS.data_dir)
    exported = export(
        workdir,
        ptq="min_max",
        weight_bits=",".join(map(str, BITS)),
        granularity=",".join(GRANULARITIES),
        data_dir=FLAGS.data_dir,
    )
    return {"config": f"configs/{config}.flags", "training": training, "export": exported}


def main(_):
    models = MODELS | (WITHOUT_PENALTY if FLAGS.without_penalty else {})
    record = {name: measure(config) for name, config in models.items()}
    page = render(record)
    write_results(ROOT / "results", "min_max", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
