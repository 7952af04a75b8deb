"""Post-training quantization of CIFAR-10 models: method by bits by granularity, in integer accuracy.

python experiments/ptq.py --data_dir=...  trains configs/cifar10_*.flags unless there are runs or committed checkpoints,
quantizes each with every method on 1,024 training images, and runs every file over all test images in LiteRT.
Resumable: each model and method is one export, made once. Leaves results/ptq.json and results/ptq.md.
"""

from absl import app, flags
from commands import ROOT, export, train
from tables import GRANULARITIES, write_results
from tabulate import tabulate

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with the dataset; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/cifar10", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the table.")
flags.DEFINE_list(
    "models",
    ["cifar10_bn", "cifar10_oabn", "cifar10_qarepvgg", "cifar10_no_identity"],
    "Names of files in configs/, without .flags.",
)
flags.DEFINE_integer("calibration_images", 1024, "Training images that methods see.", lower_bound=1)

_ALL_BITS, _LOW_BITS = (8, 6, 5, 4, 3), (4, 3)
# Methods that learn take minutes; where every method keeps 8 and 6 bits, two models show it.
_LEARNED_AT_MORE_BITS = ("cifar10_bn", "cifar10_oabn")
RANGE_METHODS = ("min_max", "percentile", "mse", "dfq")
LEARNED_METHODS = ("adaround", "adaquant", "equalize+adaround", "equalize+adaquant", "codebook")
flags.DEFINE_list("methods", [*RANGE_METHODS, *LEARNED_METHODS], "Methods, as of export/main.py --ptq.")


def bits_for(model, method):
    if method in RANGE_METHODS:
        return _ALL_BITS
    return (8, 6, *_LOW_BITS) if model in _LEARNED_AT_MORE_BITS else _LOW_BITS


def quantize(model, method):
    workdir = f"{FLAGS.runs}/{model}"
    return export(
        workdir,
        output=f"{workdir}/ptq/{method.replace('+', '_')}",
        ptq=method,
        weight_bits=",".join(map(str, bits_for(model, method))),
        granularity=",".join(GRANULARITIES),
        calibration_images=FLAGS.calibration_images,
        data_dir=FLAGS.data_dir,
    )


def table(reports):
    """One row per method: per tensor / per channel for each width, and seconds per file."""
    rows = []
    for method, report in reports.items():
        top1 = {(entry["weight_bits"], entry["granularity"]): entry["top1_percent"] for entry in report["files"]}
        cells = [
            " / ".join(f"{top1[bits, kind]:.1f}" for kind in GRANULARITIES) if (bits, "per_tensor") in top1 else ""
            for bits in _ALL_BITS
        ]
        slowest = max(entry["quantization_seconds"] for entry in report["files"])
        rows.append([method, *cells, f"{slowest:.0f} s"])
    headers = ["method", *(f"{bits} bit" for bits in _ALL_BITS), "slowest"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(_):
    trained, reports = {}, {}
    for model in FLAGS.models:
        trained[model] = train(model, f"{FLAGS.runs}/{model}", data_dir=FLAGS.data_dir)
        reports[model] = {method: quantize(model, method) for method in FLAGS.methods}
    sections = []
    for model, of_model in reports.items():
        first = next(iter(of_model.values()))
        notes = {
            f"{method}: {note}"
            for method, report in of_model.items()
            for entry in report["files"]
            for note in entry.get("notes", ())
        }
        sections.append(
            f"## {model}: FP32 {first['float_fused_top1_percent']:.1f} %\n\n{table(of_model)}\n\n"
            + "\n".join(f"- {note}" for note in sorted(notes))
        )
    separator = "\n\n"
    images = f"{first['images']:,}"
    page = f"""# Post-training quantization

`python experiments/ptq.py`: one seed, {images} test images, every file run in LiteRT, {FLAGS.calibration_images:,}
training images for calibration. Top-1 in percent, per tensor / per channel; int8 activations. Images: JPEG re-encodings
(quality 75) of CIFAR-10 where --data_dir points at the project's shared copy.

{separator.join(sections)}
"""
    write_results(ROOT / FLAGS.results, "ptq", {"training": trained, "exports": reports}, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
