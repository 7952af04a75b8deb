"""Choices of levels that experiments/fit.py compares with those of `Fitter`."""

from collections.abc import Mapping

from tf_repvgg.quantization.fitting import Fitter, Level
from tf_repvgg.quantization.fitting.choice import Costs, Damages

_ROUNDS = 4
_WHOLE = Level(256, per_channel=False)


def keep_ends_whole(uniform: Mapping[str, Level]) -> dict[str, Level]:
    """8 bits in the first and the last layer, and the levels of a uniform choice elsewhere.

    Args:
      uniform: {layer: level}, in execution order.
    """
    first, *_, last = uniform
    return {**uniform, first: _WHOLE, last: _WHOLE}


def fit_greedily(fitter: Fitter, file_bytes: int) -> dict[str, Level]:
    """The choice of `choose_greedily` whose file has at most so many bytes.

    Args:
      fitter: Fitter with its damages and costs.
      file_bytes: Largest size of the file.

    Raises:
      ValueError: If no file is small enough.
    """
    limit = file_bytes - fitter.compare_with_estimate(fitter.smallest)["file_bytes"]
    for _ in range(_ROUNDS):
        levels = choose_greedily(fitter.damages, fitter.costs, limit)
        if levels is None:
            break
        excess = fitter.build(levels, "codebook").assignment.measured["file_bytes"] - file_bytes
        if excess <= 0:
            return levels
        limit -= excess
    raise ValueError(f"no greedy choice has a file of at most {file_bytes:,} bytes")


def choose_greedily(damages: Damages, costs: Costs, limit: float) -> dict[str, Level] | None:
    """Chooses from the most expensive levels downwards: each step is the one that saves most for its damage.

    A reference for `choose`; the first kind of cost counts.

    Args:
      damages: {layer: {level: damage}}.
      costs: {layer: {level: cost of each kind}}.
      limit: Limit of the first kind of cost.

    Returns:
      {layer: level}; None if not even the cheapest levels are within the limit.
    """

    def cost(layer, level):
        return costs[layer][level][0]

    levels = {
        layer: min(damages[layer], key=lambda level: (damages[layer][level], cost(layer, level))) for layer in damages
    }
    while sum(cost(layer, level) for layer, level in levels.items()) > limit:
        steps = [
            (
                (damages[layer][level] - damages[layer][current]) / (cost(layer, current) - cost(layer, level)),
                layer,
                level,
            )
            for layer, current in levels.items()
            for level in damages[layer]
            if cost(layer, level) < cost(layer, current)
        ]
        if not steps:
            return None
        _, layer, level = min(steps)
        levels[layer] = level
    return levels
