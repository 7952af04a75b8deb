"""mobileone.json and mobileone_cifar.json, as objects that answer the template's questions about their numbers."""

from collections.abc import Mapping

from harness.mobileone.rows import FLOAT, SETS
from harness.ptq.cells import AI_EDGE
from harness.results.sources import name_machines


class MobileOneImageNet:
    """mobileone.json.

    Args:
      record: Content of the file.
    """

    def __init__(self, record: Mapping) -> None:
        self._rows = {
            (row["method"], row["bits"], row["granularity"], row["activation_bits"]): row for row in record["rows"]
        }
        self.fp32 = self._read(self._rows[FLOAT, 8, "per_channel", 8])
        self.calibration_images = record["calibration_images"]
        self.machine = name_machines([record["machine"]])

    def top1(self, method: str, bits: int, granularity: str) -> list[float]:
        """Top-1 on photographs of classes that calibration shows, and of others."""
        return self._read(self._rows[method, bits, granularity, 8])

    def loss(self, method: str, bits: int, granularity: str) -> float:
        """The larger of the losses on the two sets, in points."""
        return max(fp32 - top1 for fp32, top1 in zip(self.fp32, self.top1(method, bits, granularity), strict=True))

    def google(self, bits: int, granularity: str) -> list[list[float]]:
        """Top-1 of ai-edge-quantizer's methods."""
        return [self.top1(AI_EDGE + method, bits, granularity) for method in ("min_max", "octav")]

    def seconds(self, method: str, bits: int, granularity: str) -> float:
        """Seconds from the float network to a checked file."""
        return self._rows[method, bits, granularity, 8]["seconds"]

    def _read(self, row):
        return [row[f"{name}_top1_percent"] for name in SETS]


class MobileOneCifar:
    """mobileone_cifar.json.

    Args:
      record: Content of the file.
    """

    def __init__(self, record: Mapping) -> None:
        self._models = record["models"]
        self.k = record["chosen_k"]
        self.diverged = [title for title, model in self._models.items() if model["has_diverged"]]
        self.machine = name_machines([record["machine"]])

    def fp32(self, title: str) -> float:
        """FP32 top-1."""
        return self._models[title]["float_top1_percent"]

    def gain(self, bits: int, granularity: str) -> float:
        """Integer top-1 of OABN minus that of BN, in points."""
        return self._difference(lambda model: model["integer_top1_percent"][f"{bits} {granularity}"])

    def gain_alone(self, kind: str, granularity: str) -> float:
        """The same with 4 bits in one kind of layers alone."""
        return self._difference(lambda model: model["low_bits_alone_top1_percent"][kind][f"8 {granularity}"])

    def outlier(self, title: str, kind: str) -> float:
        """Median over the layers of a kind of the largest weight over the layer's standard deviation."""
        return self._models[title]["weights"][kind]["outlier_ratio_median"]

    def _difference(self, read):
        return read(self._models["OABN"]) - read(self._models["BN"])
