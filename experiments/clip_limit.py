"""Which limit k should OABN have? python experiments/clip_limit.py --data_dir=...

Trains the CIFAR-10 model with a shortened schedule on 45,000 images for every candidate: k as a number, k relative to
each kernel's spread, and the three ways of training clipped gammas. Evaluates integer files on the 5,000 held-out
images. Resumable; writes results/clip_limit.json and results/clip_limit.md.
"""

import numpy as np
from absl import app, flags
from harness.commands import ROOT, export, train
from harness.oabn_limit.candidates import CANDIDATES, CONFIG, DEFAULT_MODE
from harness.oabn_limit.clip_page import BITS, render
from harness.tables import write_results

from tf_repvgg import provenance
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/clip_limit", "Folder of the training runs.")
flags.DEFINE_integer("epochs", 4, "Epochs of every candidate; the final models train longer.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 3, "Number of these epochs that train on small crops.", lower_bound=0)


def measure(candidate):
    """Trains one candidate and evaluates the integer files; returns its row."""
    workdir = f"{FLAGS.runs}/{'_'.join(candidate.values())}"
    schedule = {"epochs": FLAGS.epochs, "early_epochs": FLAGS.early_epochs}
    train(CONFIG, workdir, validation=True, data_dir=FLAGS.data_dir, **schedule, **candidate)
    result = export(
        workdir,
        ptq="min_max",
        weight_bits=",".join(map(str, BITS)),
        granularity=",".join(GRANULARITIES),
        evaluation_split="validation",
        data_dir=FLAGS.data_dir,
    )
    blocks = [layer for layer in result["outliers"] if layer["gamma_over_sigma"]]
    top1 = {f"{file['weight_bits']} {file['granularity']}": file["top1_percent"] for file in result["files"]}
    return {
        **candidate,
        "float_top1_percent": result["float_fused_top1_percent"],
        "integer_top1_percent": top1,
        "mean_integer_top1_percent": round(float(np.mean(list(top1.values()))), 3),
        "gamma_over_sigma_median": [round(block["gamma_over_sigma"][1], 4) for block in blocks],
        "gamma_over_sigma_largest": round(max(block["gamma_over_sigma"][2] for block in blocks), 4),
        "clipped_share": [block["clipped_share"] for block in blocks],
        "largest_outlier_ratio": round(max(layer["outlier_ratio"] for layer in result["outliers"]), 1),
    }


def choose(rows):
    """The row of the best limit: of plain BN's peers, in the default clip mode."""
    limited = [row for row in rows if row["oabn_clip_mode"] == DEFAULT_MODE and row["oabn_k"] != "inf"]
    return max(limited, key=lambda row: row["mean_integer_top1_percent"])


def main(_):
    rows = [measure(candidate) for candidate in CANDIDATES]
    record = {
        "config": f"configs/{CONFIG}.flags",
        "epochs": FLAGS.epochs,
        "early_epochs": FLAGS.early_epochs,
        "split": "validation",
        "machine": provenance.machine(),
        "chosen": choose(rows),
        "rows": rows,
    }
    page = render(record)
    write_results(ROOT / "results", "clip_limit", record, page)
    print(page)
    chosen = record["chosen"]["oabn_k"]
    if f"--oabn_k={chosen}" not in (ROOT / record["config"]).read_text(encoding="utf-8").split():
        print(f"{record['config']} has another --oabn_k than {chosen}; set the chosen one.")


if __name__ == "__main__":
    app.run(main)
