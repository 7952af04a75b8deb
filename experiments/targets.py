"""What runtimes beyond LiteRT make of a CIFAR-10 model: python experiments/targets.py --data_dir=...

Quantizes one trained model to 8 bits, to uniform 4 bits and to a codebook, makes each file ready for TFLite Micro with
tables, for LiteRT with 4-bit storage, for an Arm Ethos-U and for the Edge TPU, and runs the whole test split wherever
an interpreter is at hand. Starts from the checkpoints in results/checkpoints where they are. About 20 minutes, most of
them in TFLite Micro; resumable. Leaves results/targets.json and results/targets.md.
"""

from absl import app, flags
from harness.commands import ROOT, export, train
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import provenance
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_string("config", "cifar10_oabn", "Of the model: a file in configs/, without .flags.")
flags.DEFINE_string("accelerator", "ethos_u55_128", "Ethos-U that Vela compiles for.")

# (words, flags of export/main.py, its targets beside the accelerator)
WAYS = (
    ("uniform", {"weight_bits": "8", "granularity": "per_tensor,per_channel"}, ("edge_tpu",)),
    ("uniform", {"weight_bits": "4", "granularity": "per_channel"}, ("litert_int4", "tflm_lut")),
    ("codebook", {"weight_bits": "3", "granularity": "per_tensor", "ptq": "codebook"}, ("tflm_lut",)),
)
HEADERS = (
    "weights",
    "LiteRT",
    "TFLite Micro",
    "bit for bit",
    "file kB",
    "packed kB",
    "over bound",
    "Vela kB",
    "of int8",
    "ms",
    "on NPU",
)


def row(words, entry):
    """Cells of one file; empty where it was not made ready for a runtime."""
    micro, vela = entry["targets"].get("tflm_lut", {}), entry["targets"][FLAGS.accelerator]
    packed = micro or entry["targets"].get("litert_int4", {})
    return [
        f"{words}, {entry['weight_bits']} bit, {GRANULARITIES[entry['granularity']]}",
        f"{entry['top1_percent']:.2f}",
        f"{micro['top1_percent']:.2f}" if micro else "",
        f"{micro['equal_to_int8_file_on_same_kernels_percent']:.0f} %" if micro else "",
        f"{entry['file_bytes'] / 1000:.0f}",
        f"{packed['file_bytes'] / 1000:.0f}" if packed else "",
        f"{micro['file_over_bound']:.3f}" if micro else "",
        f"{vela['encoded_weight_bytes'] / 1000:.0f}",
        f"{100 * vela['encoded_over_raw']:.0f} %",
        f"{vela['inference_ms_estimated']:.2f}",
        f"{vela['npu_operators']} of {vela['npu_operators'] + vela['cpu_operators']}",
    ]


def main(_):
    workdir = f"{FLAGS.runs}/{FLAGS.config}"
    train(FLAGS.config, workdir, data_dir=FLAGS.data_dir)
    exports = [
        export(
            workdir,
            output=f"{workdir}/targets/{number}",
            targets=",".join(["litert_int8", *targets, FLAGS.accelerator]),
            data_dir=FLAGS.data_dir,
            **asked,
        )
        for number, (_, asked, targets) in enumerate(WAYS)
    ]
    rows = [row(words, entry) for (words, *_), found in zip(WAYS, exports, strict=True) for entry in found["files"]]
    page = f"""# Runtimes

`python experiments/targets.py`: {FLAGS.config}, {exports[0]["images"]:,} test images, top-1 in percent. "bit for bit":
images on which TFLite Micro computes from tables what it computes from the int8 file. "packed": the file with tables
for TFLite Micro; "over bound" is its size over indices and tables and all that is no weight. Vela's columns are the
bytes that it encodes weights in, their share of int8's, the milliseconds that it estimates for {FLAGS.accelerator},
and the operators that it puts on the NPU. Images: JPEG re-encodings (quality 75) of CIFAR-10 where --data_dir points
at the project's shared copy.

{tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)}
"""
    write_results(ROOT / "results", "targets", {"machine": provenance.machine(), "exports": exports}, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
