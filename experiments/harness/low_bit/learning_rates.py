"""Learning rates, and whether to distill: chosen on validation data, with a network that has not seen them."""

from collections.abc import Iterable, Mapping

from harness.low_bit.fine_tunings import FineTunings, Setting
from harness.low_bit.methods import LEARNING_RATES, SEEDS
from tf_repvgg.quantization.uniform import GRANULARITIES

_LOWEST, *_MIDDLE, _HIGHEST = LEARNING_RATES


class Choices:
    """Choices that are made, by fine-tuning, when they are first needed.

    Args:
      fine_tunings: Source of the results.
      base: Workdir of a float run that has not seen the validation data.

    Attributes:
      rates: Grid of learning rates.
      validation_top1_percent: Everything that has been measured: {label: {rate: top-1 in percent}}.
      distill: Whether the float network teaches.
    """

    rates = LEARNING_RATES

    def __init__(self, fine_tunings: FineTunings, base: str) -> None:
        self._fine_tunings, self._base = fine_tunings, base
        self.validation_top1_percent: dict[str, dict[str, float]] = {}
        self.distill = find_best(
            {distill: max(self._measure_grid("ClusterQAT", 8, distill).values()) for distill in (False, True)}
        )

    def as_record(self) -> dict:
        """The choices as JSON keeps them."""
        return {"validation_top1_percent": self.validation_top1_percent, "distill": self.distill}

    def find_rate(self, method: str, clusters: int, granularity: str) -> float:
        """The learning rate of a method: the one for 8 clusters per tensor serves 5 and more, the one for 4 the others.

        With 16 clusters per channel, ClusterQAT has a rate of its own: it was behind the others there on test images,
        and more seeds on validation data show that it diverges with one of three at the rate for 8 per tensor.
        """
        if (method, clusters, granularity) == ("ClusterQAT", 16, "per_channel"):
            by_seed = [self._measure(_MIDDLE, seed, clusters, self.distill, granularity) for seed in SEEDS]
            return find_best({rate: sum(top1[rate] for top1 in by_seed) for rate in _MIDDLE})
        clusters = 0 if method == "float" else 8 if clusters > 4 else 4
        return find_best(self._measure_grid(method, clusters, self.distill))

    def compare(self, method: str, clusters: int, granularity: str) -> None:
        """Measures a method at the two middle rates of the grid."""
        self._measure(_MIDDLE, method, clusters, self.distill, granularity)

    def _measure_grid(self, method, clusters, distill):
        """{rate: top-1} per tensor, for the two middle rates of the grid and the one beyond the better."""
        top1 = self._measure(_MIDDLE, method, clusters, distill)
        beyond = _LOWEST if find_best(top1) == _MIDDLE[0] else _HIGHEST
        return top1 | self._measure([beyond], method, clusters, distill)

    def _measure(self, rates: Iterable[float], method, clusters, distill, granularity="per_tensor"):
        """{rate: top-1}, which are noted in `validation_top1_percent` too."""
        top1 = {}
        for rate in rates:
            setting = Setting(self._base, method, clusters, granularity, rate, distill, split="validation")
            top1[rate] = self._fine_tunings.measure(setting).top1
        # "states" are clusters: the label is a key of low_bit.json.
        weights = [f"{clusters} states", GRANULARITIES[granularity]] if clusters else []
        label = ", ".join([method, *weights, *(["distilled"] if distill else [])])
        noted = self.validation_top1_percent.setdefault(label, {})
        noted |= {str(rate): round(value, 2) for rate, value in top1.items()}
        return top1


def find_best(top1: Mapping) -> object:
    """The key of the largest value."""
    return max(top1, key=top1.get)
