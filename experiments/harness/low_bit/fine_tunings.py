"""Fine-tunings of float runs: each is trained and exported once, and what it gets right is kept image by image."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness import commands
from harness.low_bit.methods import CONFIG, METHODS
from tf_repvgg import provenance, runs
from tf_repvgg.storage import FinishedWork


@dataclasses.dataclass(frozen=True)
class Task:
    """The data that networks are fine-tuned on.

    Attributes:
      config: Flagfile in configs/ that all fine-tunings share, without .flags.
      images: {split: number of its images}.
    """

    config: str
    images: Mapping[str, int]


CIFAR10 = Task(CONFIG, {"test": 10_000, "validation": 5_000})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A float network, and how it is fine-tuned.

    Attributes:
      base: Workdir of the float run.
      method: Name in `METHODS`.
      clusters: Number of weight levels of every layer; 0 for float weights.
      granularity: "per_tensor" or "per_channel".
      rate: Learning rate of the grid.
      distill: Whether the float network teaches.
      split: "test", or "validation" for a base that has not seen those images.
      edge_clusters: Number of weight levels of stem and classifier; None for the number of the other layers.
    """

    base: str
    method: str
    clusters: int
    granularity: str
    rate: float
    distill: bool
    split: str = "test"
    edge_clusters: int | None = None

    @property
    def name(self) -> str:
        """Name of the fine-tuning, for files and folders."""
        parts = [
            self.base.rpartition("/")[2],
            self.method,
            self.clusters,
            self.granularity,
            self.rate,
            "distilled" if self.distill else "",
            self.edge_clusters,
        ]
        return "_".join(str(part) for part in parts if part).replace(" ", "_").replace(",", "")

    @property
    def optimizer_rate(self) -> float:
        """Learning rate of the method's optimizer."""
        return self.rate * METHODS[self.method].rate_scale

    @property
    def trainings(self) -> list[dict]:
        """Flags of train/main.py, one training after the other, without those of the base."""
        edges = {"stem": self.edge_clusters, "logits": self.edge_clusters} if self.edge_clusters else {}
        common = {"learning_rate": self.optimizer_rate, "validation": self.split == "validation"}
        trainings = METHODS[self.method].make_trainings(edges | {".*": self.clusters}, self.granularity)
        return [common | flags for flags in trainings]

    def find_inputs(self, config: str) -> dict[str, str]:
        """What the result depends on: hashes of the base's weights, and of the flags of the trainings.

        Args:
          config: Flagfile that all fine-tunings share.
        """
        lines = (commands.ROOT / "configs" / f"{config}.flags").read_text(encoding="utf-8").splitlines()
        shared = [line for line in lines if line.startswith("--")]
        flags = json.dumps([shared, self.trainings], sort_keys=True)
        return {
            "base_sha256": runs.model_sha256(commands.ROOT / self.base),
            "flags_sha256": hashlib.sha256(flags.encode()).hexdigest(),
        }


class Result:
    """The images that a fine-tuned network gets right.

    Attributes:
      is_right: Bool array [images], of the integer file, or of the float network.
      top1: Accuracy in percent; 0 if training diverged, in which case no image counts as right.
      fidelity: Comparison of the integer file with the model that was trained: "agreement_percent" of their classes,
        and "trained_model_top1_percent". Empty for float; the values are None after training that diverged.
    """

    def __init__(self, is_right: np.ndarray, fidelity: Mapping[str, Any] | None = None) -> None:
        self.is_right = is_right
        self.top1 = 100 * float(np.mean(is_right))
        self.fidelity = fidelity or {}

    @property
    def has_diverged(self) -> bool:
        """Whether training diverged."""
        return not self.is_right.any()

    def as_record(self) -> dict:
        """The result as JSON keeps it."""
        bits = base64.b64encode(np.packbits(self.is_right)).decode("ascii")
        top1 = {"top1_percent": round(self.top1, 3), "images": len(self.is_right)}
        return top1 | {"fidelity": self.fidelity, "is_right_packed_bits": bits}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Result":
        """The result that `as_record` has written."""
        packed = np.frombuffer(base64.b64decode(record["is_right_packed_bits"]), np.uint8)
        return cls(np.unpackbits(packed, count=record["images"]).astype(bool), record["fidelity"])

    @classmethod
    def from_divergence(cls, images: int) -> "Result":
        """The result of training that diverged, on that many images."""
        return cls(np.zeros(images, bool), {"agreement_percent": None, "trained_model_top1_percent": None})

    @classmethod
    def from_export(cls, folder: Path, export: Mapping[str, Any]) -> "Result":
        """The result of an export: its folder, and the content of its export.json."""
        with np.load(folder / "predictions.npz") as classes:
            if "trained_model" not in classes:
                return cls(classes["float_fused"] == classes["labels"])
            (file,) = export["files"]
            fidelity = {
                "agreement_percent": file["agreement_with_trained_model_percent"],
                "trained_model_top1_percent": export["trained_model_top1_percent"],
            }
            return cls(classes[file["file"]] == classes["labels"], fidelity)


class FineTunings:
    """Fine-tunings by setting.

    Args:
      folder: Folder of the kept results.
      runs_folder: Folder of the training runs, relative to the repository.
      data_dir: Flag of train/main.py.
      task: Data to fine-tune on.
    """

    def __init__(self, folder: Path, runs_folder: str, data_dir: str | None, task: Task = CIFAR10) -> None:
        self._kept = FinishedWork(folder)
        self._runs_folder, self._data_dir, self._task = runs_folder, data_dir, task

    def measure(self, setting: Setting) -> Result:
        """The kept result of a setting; trains and exports unless there is one, or a finished export."""
        inputs = setting.find_inputs(self._task.config)
        record = self._kept.find(setting.name, inputs)
        return Result.from_record(record or self._kept.keep(setting.name, inputs, self._make(setting, inputs)))

    def _make(self, setting, inputs):
        workdir = f"{self._runs_folder}/{setting.name}_{'_'.join(sha256[:8] for sha256 in inputs.values())}"
        path = commands.ROOT / workdir / "export" / "export.json"  # written last
        try:
            if not path.exists():
                self._train_and_export(workdir, setting)
            export = json.loads(path.read_text(encoding="utf-8"))
            return {"machine": export["machine"]} | Result.from_export(path.parent, export).as_record()
        except commands.Diverged:
            return {"machine": provenance.machine()} | Result.from_divergence(
                self._task.images[setting.split]
            ).as_record()

    def _train_and_export(self, workdir, setting):
        start = setting.base
        teacher = {"distill_from": setting.base} if setting.distill else {}
        *earlier, last = setting.trainings
        for number, flags in enumerate(earlier, 1):
            start = self._train(f"{workdir}_run{number}", start, teacher | flags)
        self._train(workdir, start, teacher | last)
        commands.export(workdir, evaluation_split=setting.split, data_dir=self._data_dir)

    def _train(self, workdir, start, flags):
        commands.train(self._task.config, workdir, init_from=start, data_dir=self._data_dir, **flags)
        return workdir
