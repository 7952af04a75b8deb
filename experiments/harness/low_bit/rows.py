"""Rows of the tables of experiments/low_bit.py: one method at one number of clusters, on one or more models."""

from collections.abc import Collection, Mapping

from harness.low_bit.fine_tunings import FineTunings, Result, Setting
from harness.low_bit.learning_rates import Choices
from harness.low_bit.paired_statistics import estimate_drop


class Rows:
    """Makes rows, by fine-tuning.

    Args:
      fine_tunings: Source of the results.
      choices: Learning rates, and whether to distill.
      bases: Workdirs of the float runs by title of the model.
    """

    def __init__(self, fine_tunings: FineTunings, choices: Choices, bases: Mapping[str, str]) -> None:
        self._fine_tunings, self._choices, self._bases = fine_tunings, choices, bases

    def make(
        self,
        models: Collection[str],
        method: str,
        clusters: int,
        granularity: str,
        *,
        edge_clusters: int | None = None,
        rate: float | None = None,
        target: float | None = None,
        with_lead: bool = False,
    ) -> dict:
        """One row, as JSON keeps it; "states" are the clusters.

        Args:
          models: Titles of the models.
          method: Name in `METHODS`.
          clusters: Number of weight levels of every layer.
          granularity: "per_tensor" or "per_channel".
          edge_clusters: Number of weight levels of stem and classifier, if they have their own.
          rate: Learning rate of the grid to try first; by default the chosen one.
          target: Largest drop that meets the target, in points.
          with_lead: Whether to add ClusterQAT's lead over the method, with the same weights.
        """
        references = [self._measure(model, "float")[0] for model in models]
        measured = [self._measure(model, method, clusters, granularity, edge_clusters, rate) for model in models]
        results, rates = zip(*measured, strict=True)
        drop, half = estimate_drop(references, results)
        row = {
            "models": list(models),
            "method": method,
            "states": clusters,
            "granularity": granularity,
            "stem_and_classifier_states": edge_clusters or clusters,
            "reference_top1_percent": [round(result.top1, 2) for result in references],
            "integer_top1_percent": [round(result.top1, 2) for result in results],
            "drop": round(drop, 3),
            "half_interval": round(half, 3),
            "learning_rates": list(rates),
            "agreement_percent": [result.fidelity["agreement_percent"] for result in results],
            "trained_model_top1_percent": [result.fidelity["trained_model_top1_percent"] for result in results],
        }
        if target is not None:
            row |= {"asked": target, "is_met": bool(drop - half <= target)}
        if with_lead:
            leaders = [self._measure(model, "ClusterQAT", clusters, granularity)[0] for model in models]
            lead, half = estimate_drop(leaders, results)
            row |= {"clusterqat_ahead": round(lead, 3), "clusterqat_ahead_half_interval": round(half, 3)}
        return row

    def _measure(
        self, model, method, clusters=0, granularity="per_tensor", edge_clusters=None, rate=None
    ) -> tuple[Result, float]:
        """The result of a model, and the optimizer's learning rate: the highest that does not diverge."""
        highest = rate or self._choices.find_rate(method, clusters, granularity)
        for rate in sorted((rate for rate in self._choices.rates if rate <= highest), reverse=True):
            setting = Setting(
                self._bases[model],
                method,
                clusters,
                granularity,
                rate,
                self._choices.distill,
                edge_clusters=edge_clusters,
            )
            result = self._fine_tunings.measure(setting)
            if not result.has_diverged:
                break
        return result, setting.optimizer_rate
