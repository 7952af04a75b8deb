"""The trainings of experiments/codebook_limit.py: a model with one limit k, fine-tuned to each number of clusters."""

from pathlib import Path

import numpy as np

from harness import commands
from harness.oabn_limit.candidates import CONFIG, LIMITS
from tf_repvgg import provenance
from tf_repvgg.storage import FinishedWork

CLUSTERS = ("8", "4")
FINE_TUNING = {"quantize": "clusterqat", "epochs": 1, "freeze_epochs": 0.1, "learning_rate": 0.002}
FINALISTS, FINAL_SEEDS = 2, (1, 2)


class Trainings:
    """Trainings by limit and seed; each is measured once and then kept.

    Args:
      folder: Folder of the kept trainings.
      runs: Folder of the training runs.
      schedule: Flags of train/main.py that shorten the training of the config: "epochs" and "early_epochs".
      data_dir: TFDS data directory; None for TFDS's own.
    """

    def __init__(self, folder: Path, runs: str, schedule: dict, data_dir: str | None) -> None:
        self._kept = FinishedWork(folder)
        self._runs, self._schedule, self._data_dir = runs, schedule, data_dir

    def measure(self, k: str, seed: int) -> dict:
        """The kept record of one training, which is run unless it is there.

        Returns:
          Top-1 in percent on validation data as "float" and per number of clusters; "oabn_k", "seed" and "machine".
        """
        name, inputs = f"{k}_seed{seed}", {"oabn_k": k, "seed": seed, **self._schedule, "fine_tuning": FINE_TUNING}
        return self._kept.find(name, inputs) or self._kept.keep(name, inputs, self._train(k, seed))

    def _train(self, k, seed):
        base = f"{self._runs}/{k}_codebook_seed{seed}"
        common = {"validation": True, "seed": seed, "data_dir": self._data_dir}
        result = commands.train(CONFIG, base, oabn_k=k, **self._schedule, **common)
        top1 = {"float": result["top1_percent"]}
        for clusters in CLUSTERS:
            workdir, models = f"{base}_{clusters}_states", {"init_from": base, "distill_from": base}
            flags = {"number_of_clusters": clusters, **models, **FINE_TUNING, **common}
            top1[clusters] = commands.train("cifar10_fine_tuning", workdir, **flags)["top1_percent"]
        return top1 | {"machine": provenance.machine()}


def average(trainings: list[dict], k: str, *columns: str) -> float:
    """Mean top-1 of one limit over columns and seeds."""
    return float(np.mean([[run[column] for column in columns] for run in trainings if run["oabn_k"] == k]))


def list_seeds(trainings: list[dict], k: str) -> list[int]:
    """Seeds with which a limit is trained."""
    return [run["seed"] for run in trainings if run["oabn_k"] == k]


def pick_finalists(trainings: list[dict]) -> list[str]:
    """The limits to train with more seeds: the best ones of seed 0, and the limit of the config."""
    top1 = {run["oabn_k"]: np.mean([run[count] for count in CLUSTERS]) for run in trainings if run["seed"] == 0}
    config = (commands.ROOT / "configs" / f"{CONFIG}.flags").read_text(encoding="utf-8").split()
    limits_of_config = [k for k in LIMITS if f"--oabn_k={k}" in config]
    return list(dict.fromkeys([*sorted(top1, key=top1.get, reverse=True)[:FINALISTS], *limits_of_config]))


def choose(trainings: list[dict]) -> str | None:
    """The best of the limits that are trained with all seeds; None before there is one."""
    finalists = [k for k in LIMITS if len(list_seeds(trainings, k)) == 1 + len(FINAL_SEEDS)]
    return max(finalists, key=lambda k: average(trainings, k, *CLUSTERS), default=None)
