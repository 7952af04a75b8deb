"""Which k of OABN serves a codebook best, on validation data: python experiments/codebook_limit.py --data_dir=...

Trains the CIFAR-10 model as experiments/clip_limit.py does, for every k, and fine-tunes each for an epoch of ClusterQAT
at 8 and 4 states per tensor, distilled from itself. One seed cannot tell neighbours apart: the best two and the k of
the config are trained with two more. About 80 minutes on 2 cores. Resumable at any point, on another machine too;
leaves results/codebook_limit.json and results/codebook_limit.md.
"""

import itertools
import json

import clip_limit
import numpy as np
from absl import app, flags
from harness.commands import ROOT, train
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import provenance

FLAGS = flags.FLAGS  # those of clip_limit.py

STATES = ("8", "4")
FINE_TUNING = {"quantize": "clusterqat", "epochs": 1, "freeze_epochs": 0.1, "learning_rate": 0.002}
FINALISTS, FINAL_SEEDS = 2, (1, 2)
CANDIDATES = [c["oabn_k"] for c in clip_limit.CANDIDATES if c["oabn_clip_mode"] == clip_limit.DEFAULT_MODE]


def measure(record, k, seed):
    """Adds to record["trainings"], unless it is there: top-1 on validation data in float, and per number of states."""
    if any(found["oabn_k"] == k and found["seed"] == seed for found in record["trainings"]):
        return
    base = f"{FLAGS.runs}/{k}_codebook_seed{seed}"
    common = {"validation": True, "seed": seed, "data_dir": FLAGS.data_dir}
    schedule = {"epochs": FLAGS.epochs, "early_epochs": FLAGS.early_epochs}
    found = {"oabn_k": k, "seed": seed}
    found["float"] = train(clip_limit.CONFIG, base, oabn_k=k, **schedule, **common)["top1_percent"]
    for states in STATES:
        workdir, model = f"{base}_{states}_states", {"init_from": base, "distill_from": base}
        result = train("cifar10_fine_tuning", workdir, number_of_clusters=states, **model, **FINE_TUNING, **common)
        found[states] = result["top1_percent"]
    record["trainings"].append(found)
    write(record)


def mean(record, k, *columns):
    """Top-1 over columns and seeds."""
    return float(np.mean([[run[column] for column in columns] for run in record["trainings"] if run["oabn_k"] == k]))


def finalists_of(record):
    """The best of seed 0, and the k of the config."""
    first = {
        run["oabn_k"]: np.mean([run[states] for states in STATES]) for run in record["trainings"] if not run["seed"]
    }
    config = (ROOT / "configs" / f"{clip_limit.CONFIG}.flags").read_text(encoding="utf-8").split()
    of_config = [k for k in CANDIDATES if f"--oabn_k={k}" in config]
    return dict.fromkeys([*sorted(first, key=first.get, reverse=True)[:FINALISTS], *of_config])


def write(record):
    seeds = {k: [run["seed"] for run in record["trainings"] if run["oabn_k"] == k] for k in CANDIDATES}
    finalists = [k for k in CANDIDATES if len(seeds[k]) == 1 + len(FINAL_SEEDS)]
    record["chosen"] = max(finalists, key=lambda k: mean(record, k, *STATES), default=None)
    rows = [
        [
            f"**{k}**" if k == record["chosen"] else k,
            len(seeds[k]),
            *(f"{mean(record, k, column):.2f}" for column in ("float", *STATES)),
            f"{mean(record, k, *STATES):.2f}",
        ]
        for k in CANDIDATES
        if seeds[k]
    ]
    headers = ["k", "seeds", "FP32", *(f"{states} states" for states in STATES), "mean of these"]
    page = f"""# Which k serves a codebook

`python experiments/codebook_limit.py`: the CIFAR-10 model of configs/{clip_limit.CONFIG}.flags with
{FLAGS.epochs} epochs ({FLAGS.early_epochs} of them on small crops) on 45,000 images, then one epoch of ClusterQAT
(per tensor, 8-bit activations, distilled from the same model, learning rate {FINE_TUNING["learning_rate"]}); top-1 in
percent on the 5,000 held-out images, as the training program evaluates it, mean over the seeds. FP32 is before that
epoch. `inf` is plain batch normalization. Chosen (bold): the highest mean of those with {1 + len(FINAL_SEEDS)} seeds.
Images: JPEG re-encodings (quality 75) of CIFAR-10 where --data_dir points at the project's shared copy.

{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}
"""
    write_results(ROOT / "results", "codebook_limit", record, page)


def main(_):
    path = ROOT / "results" / "codebook_limit.json"
    record = {
        "config": f"configs/{clip_limit.CONFIG}.flags",
        "epochs": FLAGS.epochs,
        "early_epochs": FLAGS.early_epochs,
        "fine_tuning": FINE_TUNING,
        "split": "validation",
        "machine": provenance.machine(),
        "trainings": json.loads(path.read_text(encoding="utf-8"))["trainings"] if path.exists() else [],
    }
    for k in CANDIDATES:
        measure(record, k, 0)
    for seed, k in itertools.product(FINAL_SEEDS, finalists_of(record)):
        measure(record, k, seed)
    write(record)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    app.run(main)
