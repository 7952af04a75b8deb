"""Local search: damages do not quite add up, so neighbours of a choice are measured whole."""

from collections.abc import Callable, Iterator, Sequence

from tf_repvgg.quantization.fitting.assignment import Level
from tf_repvgg.quantization.fitting.choice import Costs, Damages

Levels = dict[str, Level]


def fits(levels: Levels, costs: Costs, limits: Sequence[float]) -> bool:
    """Whether the sums of the levels' costs are within their limits.

    Args:
      levels: {layer: level}.
      costs: {layer: {level: cost of each kind}}.
      limits: Limit of each kind.
    """
    return all(
        sum(costs[layer][level][kind] for layer, level in levels.items()) <= limit for kind, limit in enumerate(limits)
    )


def search(
    starts: Sequence[Levels],
    damages: Damages,
    costs: Costs,
    limits: Sequence[float],
    measure: Callable[[Levels], float],
    evaluations: int,
) -> tuple[Levels, float]:
    """Takes the best start, and moves to better neighbours, until none is better or the evaluations are used up.

    A neighbour has another level in one layer, or in two. Those with the smallest sum of damages are measured first.

    Args:
      starts: Choices to start from, within the limits.
      damages: {layer: {level: damage}}.
      costs: {layer: {level: cost of each kind}}.
      limits: Limit of each kind of cost.
      measure: Function from a choice to its error.
      evaluations: Largest number of neighbours to measure.

    Returns:
      The best choice, and its error.
    """
    errors = {_key(levels): measure(levels) for levels in starts}
    best = min(starts, key=lambda levels: errors[_key(levels)])
    while evaluations > 0:
        neighbours = [levels for levels in _list_neighbours(best, damages, costs, limits) if _key(levels) not in errors]
        improved = None
        for levels in neighbours[:evaluations]:
            evaluations -= 1
            errors[_key(levels)] = measure(levels)
            if errors[_key(levels)] < errors[_key(best)]:
                improved = levels
                break
        if improved is None:
            break
        best = improved
    return best, errors[_key(best)]


def _key(levels):
    return tuple(levels.items())


def _list_neighbours(levels, damages, costs, limits) -> list[Levels]:
    """Neighbours within the limits, those with the smallest sum of damages first."""

    def damage(changes):
        return sum(damages[layer][level] - damages[layer][levels[layer]] for layer, level in changes.items())

    changes = [change for change in _list_changes(levels, damages) if fits(levels | change, costs, limits)]
    return [levels | change for change in sorted(changes, key=damage)]


def _list_changes(levels, damages) -> Iterator[Levels]:
    single = [{layer: level} for layer in damages for level in damages[layer] if level != levels[layer]]
    yield from single
    for number, first in enumerate(single):
        yield from (first | second for second in single[number + 1 :] if first.keys() != second.keys())
