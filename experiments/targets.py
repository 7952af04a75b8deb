"""Which runtimes beyond LiteRT run a CIFAR-10 model, and at what cost? python experiments/targets.py --data_dir=...

Quantizes one trained model to 8 bits, to uniform 4 bits and to a codebook, makes each file ready for TFLite Micro with
tables, for LiteRT with 4-bit storage, for an Arm Ethos-U and for the Edge TPU, and runs the whole test split in every
interpreter that is installed. Starts from the checkpoint in results/checkpoints where it exists. About 20 minutes, most
of them in TFLite Micro; resumable. Writes results/targets.json and results/targets.md.
"""

from absl import app, flags
from harness.commands import ROOT, export, train
from harness.pages.targets import render
from harness.tables import write_results

from tf_repvgg import provenance

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_string("config", "cifar10_oabn", "Config of the model: a file in configs/, without .flags.")
flags.DEFINE_string("accelerator", "ethos_u55_128", "Ethos-U that Vela compiles for.")

# (flags of export/main.py, targets beside LiteRT and the accelerator)
EXPORTS = (
    ({"weight_bits": "8", "granularity": "per_tensor,per_channel", "ptq": "min_max"}, ("edge_tpu",)),
    ({"weight_bits": "4", "granularity": "per_channel", "ptq": "min_max"}, ("litert_int4", "tflm_lut")),
    ({"weight_bits": "3", "granularity": "per_tensor", "ptq": "codebook"}, ("tflm_lut",)),
)


def main(_):
    workdir = f"{FLAGS.runs}/{FLAGS.config}"
    train(FLAGS.config, workdir, data_dir=FLAGS.data_dir)
    exports = [
        export(
            workdir,
            output=f"{workdir}/targets/{number}",
            targets=",".join(["litert_int8", *targets, FLAGS.accelerator]),
            data_dir=FLAGS.data_dir,
            **options,
        )
        for number, (options, targets) in enumerate(EXPORTS)
    ]
    record = {
        "config": FLAGS.config,
        "accelerator": FLAGS.accelerator,
        "machine": provenance.machine(),
        "exports": exports,
    }
    page = render(record)
    write_results(ROOT / "results", "targets", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
