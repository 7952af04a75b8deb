"""The paper's question on CIFAR-10: what min-max quantization does to each kind of RepVGG.

python experiments/min_max.py --data_dir=...  trains configs/cifar10_*.flags on all 50,000 images (up to 25 minutes
each), exports every weight width, and tests once. Resumable; starts from the checkpoints in results/checkpoints where
they are. Leaves results/min_max.json and results/min_max.md.
"""

from absl import app, flags
from harness.commands import ROOT, export, train
from harness.tables import bits_table, write_results

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_boolean("without_penalty", False, "Two more rows: BN and OABN without --merged_weight_decay.")

BITS = (8, 6, 5, 4, 3)
MODELS = {
    "BN": "cifar10_bn",
    "OABN": "cifar10_oabn",
    "QARepVGG": "cifar10_qarepvgg",
    "no identity branch": "cifar10_no_identity",
    "constant identity gain": "cifar10_constant",
}
WITHOUT_PENALTY = {"BN, no penalty": "cifar10_bn_no_penalty", "OABN, no penalty": "cifar10_oabn_no_penalty"}


def main(_):
    models = MODELS | (WITHOUT_PENALTY if FLAGS.without_penalty else {})
    trained, exported = {}, {}
    for name, config in models.items():
        workdir = f"{FLAGS.runs}/{config}"
        trained[name] = train(config, workdir, data_dir=FLAGS.data_dir)
        exported[name] = export(
            workdir, weight_bits=",".join(map(str, BITS)), granularity="per_tensor,per_channel", data_dir=FLAGS.data_dir
        )
    page = f"""# Min-max quantization of CIFAR-10 models

`python experiments/min_max.py`: one seed, {exported["BN"]["images"]:,} test images, every file run in LiteRT.
Top-1 in percent; int8 activations, weights by min-max, per tensor / per channel. Images: JPEG re-encodings (quality
75) of CIFAR-10 where --data_dir points at the project's shared copy.

{bits_table(exported, BITS)}
"""
    record = {
        name: {"config": f"configs/{config}.flags", "training": trained[name], "export": exported[name]}
        for name, config in models.items()
    }
    write_results(ROOT / "results", "min_max", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
