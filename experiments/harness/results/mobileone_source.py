"""mobileone_cifar.json, as an object that answers the template's questions about its numbers."""

from collections.abc import Mapping

from harness.results.sources import name_machines


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
