"""Choosing OABN's k on validation data: python experiments/clip_limit.py --data_dir=...

Trains the CIFAR-10 model with shortened schedule on 45,000 images for every candidate: k as a number, k relative to
each kernel's spread, and the three ways of training clipped gammas. Evaluates integer files on the 5,000 held-out
images. Resumable; leaves results/clip_limit.json and results/clip_limit.md.
"""

import numpy as np
from absl import app, flags
from harness.commands import ROOT, export, train
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import provenance
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/clip_limit", "Folder of the training runs.")
flags.DEFINE_integer("epochs", 4, "Epochs of every candidate; the final models train longer.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 3, "How many of them train on small crops.", lower_bound=0)

BITS = (8, 5, 4)
CONFIG = "cifar10_oabn"
DEFAULT_MODE = "project"
CANDIDATES = [
    *({"oabn_k": k, "oabn_clip_mode": DEFAULT_MODE} for k in ("inf", "0.2", "0.1", "0.05", "0.025")),
    *({"oabn_k": k, "oabn_clip_mode": DEFAULT_MODE} for k in ("8std", "4std")),
    *({"oabn_k": "0.1", "oabn_clip_mode": mode} for mode in ("straight_through", "return_only")),
]


def measure(candidate):
    name = "_".join(candidate.values())
    workdir = f"{FLAGS.runs}/{name}"
    train(
        CONFIG,
        workdir,
        validation=True,
        epochs=FLAGS.epochs,
        early_epochs=FLAGS.early_epochs,
        data_dir=FLAGS.data_dir,
        **candidate,
    )
    report = export(
        workdir,
        weight_bits=",".join(map(str, BITS)),
        granularity="per_tensor,per_channel",
        evaluation_split="validation",
        data_dir=FLAGS.data_dir,
    )
    blocks = [entry for entry in report["outliers"] if entry["gamma_over_sigma"]]
    top1 = {f"{entry['weight_bits']} {entry['granularity']}": entry["top1_percent"] for entry in report["files"]}
    return {
        **candidate,
        "float_top1_percent": report["float_fused_top1_percent"],
        "integer_top1_percent": top1,
        "mean_integer_top1_percent": round(float(np.mean(list(top1.values()))), 3),
        "gamma_over_sigma_median": [round(entry["gamma_over_sigma"][1], 4) for entry in blocks],
        "gamma_over_sigma_largest": round(max(entry["gamma_over_sigma"][2] for entry in blocks), 4),
        "clipped_share": [entry["clipped_share"] for entry in blocks],
        "largest_outlier_ratio": round(max(entry["outlier_ratio"] for entry in report["outliers"]), 1),
    }


def table(rows, chosen):
    def cells(row):
        pairs = [
            " / ".join(f"{row['integer_top1_percent'][f'{width} {kind}']:.1f}" for kind in GRANULARITIES)
            for width in BITS
        ]
        median = row["gamma_over_sigma_median"]
        shares = [share for share in row["clipped_share"] if share is not None]
        return [
            f"**{row['oabn_k']}**" if row is chosen else row["oabn_k"],
            row["oabn_clip_mode"],
            f"{row['float_top1_percent']:.1f}",
            *pairs,
            f"{row['mean_integer_top1_percent']:.1f}",
            f"{min(median):.3f} .. {max(median):.3f}",
            f"{100 * np.mean(shares):.0f} %" if shares else "",
            f"{row['largest_outlier_ratio']:.0f}",
        ]

    headers = ["k", "clip mode", "FP32", "8 bit", "5 bit", "4 bit", "mean", "median gamma/sigma", "clipped", "outlier"]
    return tabulate([cells(row) for row in rows], headers, tablefmt="github", disable_numparse=True)


def main(_):
    rows = [measure(candidate) for candidate in CANDIDATES]
    absolute = [row for row in rows if row["oabn_clip_mode"] == DEFAULT_MODE and row["oabn_k"] != "inf"]
    chosen = max(absolute, key=lambda row: row["mean_integer_top1_percent"])
    page = f"""# Choosing OABN's limit k

`python experiments/clip_limit.py`: the CIFAR-10 model of configs/{CONFIG}.flags with {FLAGS.epochs} epochs
({FLAGS.early_epochs} of them on small crops) on 45,000 images, seed 0; top-1 in percent on the 5,000 held-out images,
per tensor / per channel, in LiteRT. Chosen (bold): the highest mean over the six integer columns. `inf` is plain
batch normalization. "median gamma/sigma" is the range over blocks of the median over channels of |gamma_hat| /
sqrt(variance + epsilon) on the identity branch; "clipped" the share of channels at the limit; "outlier" the largest
merged weight over its layer's standard deviation, largest over layers. Images: JPEG re-encodings (quality 75) of
CIFAR-10 where --data_dir points at the project's shared copy.

{table(rows, chosen)}
"""
    record = {
        "config": f"configs/{CONFIG}.flags",
        "epochs": FLAGS.epochs,
        "early_epochs": FLAGS.early_epochs,
        "split": "validation",
        "machine": provenance.machine(),
        "chosen": chosen,
        "rows": rows,
    }
    write_results(ROOT / "results", "clip_limit", record, page)
    print(page)
    if f"--oabn_k={chosen['oabn_k']}" not in (ROOT / "configs" / f"{CONFIG}.flags").read_text(encoding="utf-8").split():
        print(f"configs/{CONFIG}.flags has another --oabn_k than {chosen['oabn_k']}; set the chosen one.")


if __name__ == "__main__":
    app.run(main)
