"""Which k of OABN serves a codebook best, on validation data: python experiments/codebook_limit.py --data_dir=...

Trains the CIFAR-10 model as experiments/clip_limit.py does, for every k, and fine-tunes each for an epoch of ClusterQAT
at 8 and 4 states per tensor, distilled from itself. About 45 minutes on 2 cores. Resumable; leaves
results/codebook_limit.json and results/codebook_limit.md.
"""

import clip_limit
import numpy as np
from absl import app, flags
from commands import ROOT, train
from tables import write_results
from tabulate import tabulate

from tf_repvgg import runs

FLAGS = flags.FLAGS  # those of clip_limit.py

STATES = (8, 4)
FINE_TUNING = {"quantize": "clusterqat", "epochs": 1, "freeze_epochs": 0.1, "learning_rate": 0.002}


def measure(candidate):
    common = {"validation": True, "data_dir": FLAGS.data_dir}
    base = f"{FLAGS.runs}/{'_'.join(candidate.values())}"
    schedule = {"epochs": FLAGS.epochs, "early_epochs": FLAGS.early_epochs}
    top1 = train(clip_limit.CONFIG, base, **common, **schedule, **candidate)["top1_percent"]
    of_states = {
        str(states): train(
            "cifar10_fine_tuning",
            f"{base}_{states}_states",
            init_from=base,
            distill_from=base,
            number_of_clusters=states,
            **common,
            **FINE_TUNING,
        )["top1_percent"]
        for states in STATES
    }
    mean = float(np.mean(list(of_states.values())))
    return {**candidate, "float_top1_percent": top1, "top1_percent": of_states, "mean_top1_percent": mean}


def write(rows):
    chosen = max(rows, key=lambda row: row["mean_top1_percent"])
    table = [
        [
            f"**{row['oabn_k']}**" if row is chosen else row["oabn_k"],
            f"{row['float_top1_percent']:.2f}",
            *(f"{row['top1_percent'][str(states)]:.2f}" for states in STATES),
            f"{row['mean_top1_percent']:.2f}",
        ]
        for row in rows
    ]
    headers = ["k", "FP32", *(f"{states} states" for states in STATES), "mean of these"]
    page = f"""# Which k serves a codebook

`python experiments/codebook_limit.py`: the CIFAR-10 model of configs/{clip_limit.CONFIG}.flags with
{FLAGS.epochs} epochs ({FLAGS.early_epochs} of them on small crops) on 45,000 images, seed 0, then one epoch of
ClusterQAT (per tensor, 8-bit activations, distilled from the same model, learning rate
{FINE_TUNING["learning_rate"]}); top-1 in percent on the 5,000 held-out images, as the training program evaluates it.
FP32 is before that epoch. `inf` is plain batch normalization. Differences below 1.2 points are within chance. Images:
JPEG re-encodings (quality 75) of CIFAR-10 where --data_dir points at the project's shared copy.

{tabulate(table, headers, tablefmt="github", disable_numparse=True)}
"""
    record = {
        "config": f"configs/{clip_limit.CONFIG}.flags",
        "epochs": FLAGS.epochs,
        "early_epochs": FLAGS.early_epochs,
        "fine_tuning": FINE_TUNING,
        "split": "validation",
        "machine": runs.machine(),
        "chosen": chosen,
        "rows": rows,
    }
    write_results(ROOT / "results", "codebook_limit", record, page)
    return page


def main(_):
    rows, page = [], ""
    for candidate in clip_limit.CANDIDATES:
        if candidate["oabn_clip_mode"] == clip_limit.DEFAULT_MODE:
            rows.append(measure(candidate))
            page = write(rows)
    print(page)


if __name__ == "__main__":
    app.run(main)
