"""Parts of experiments/mobileone_low_bit.py: the start of all fine-tunings, and the choice of learning rates."""

from pathlib import Path

import numpy as np

from harness.low_bit.fine_tunings import FineTunings, Setting
from harness.low_bit.learning_rates import find_best
from harness.mobileone.network import FILE
from tf_repvgg import storage

_CLUSTERS = 8  # with which learning rates are chosen


class Choices:
    """Learning rates, each chosen on held-out photographs when it is first needed, per tensor.

    Args:
      fine_tunings: Source of the results.
      base: Workdir of a float run that has not seen the held-out photographs.

    Attributes:
      rates: Grid of learning rates.
      distill: Whether the float network teaches.
      validation_top1_percent: Everything that has been measured: {method: {rate: top-1 in percent}}.
    """

    rates = (5e-4, 2e-3, 8e-3)
    distill = False

    def __init__(self, fine_tunings: FineTunings, base: str) -> None:
        self._fine_tunings, self._base = fine_tunings, base
        self.validation_top1_percent: dict[str, dict[str, float]] = {}

    def find_rate(self, method: str, clusters: int, granularity: str) -> float:
        """The learning rate of a method, whatever the weights."""
        top1, common = {}, 0 if method == "float" else _CLUSTERS
        for rate in self.rates:
            setting = Setting(self._base, method, common, "per_tensor", rate, self.distill, "validation")
            top1[rate] = self._fine_tunings.measure(setting).top1
        self.validation_top1_percent[method] = {str(rate): round(value, 2) for rate, value in top1.items()}
        return find_best(top1)


def write_start(data_dir: str, path: Path) -> None:
    """Writes the network's weights under the names of github.com/apple/ml-mobileone, which train/main.py reads."""
    with np.load(Path(data_dir, FILE), allow_pickle=False) as arrays:
        renamed = {}
        for key, values in arrays.items():
            module, _, leaf = key.rpartition(".")
            renamed[key if module == "linear" else f"{module}.reparam_conv.{leaf}"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **renamed)
