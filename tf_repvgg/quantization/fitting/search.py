"""Local search: damages do not quite add up, so neighbours of a choice are measured whole."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tf_repvgg.quantization.fitting.assignment import Level
from tf_repvgg.quantization.fitting.choice import Costs, Damages

Levels = dict[str, Level]

# Changes of one layer; their pairs are listed in memory.
_MOST_CHANGES = 2000


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
    is_improving = True
    while evaluations > 0 and is_improving:
        neighbours = _find_neighbours(best, damages, costs, limits)
        new = (levels for levels in neighbours if _key(levels) not in errors)
        is_improving = False
        for levels in itertools.islice(new, evaluations):
            evaluations -= 1
            errors[_key(levels)] = measure(levels)
            if errors[_key(levels)] < errors[_key(best)]:
                best, is_improving = levels, True
                break
    return best, errors[_key(best)]


def _key(levels):
    return tuple(levels.items())


def _find_neighbours(levels, damages, costs, limits) -> Iterator[Levels]:
    """Neighbours within the limits, those with the smallest sum of damages first."""
    changes = [(layer, level) for layer in damages for level in _list_other_levels(layer, levels, costs, damages)]
    if not changes:
        return
    layers = np.array([list(damages).index(layer) for layer, _ in changes])
    damage = np.array([damages[layer][level] - damages[layer][levels[layer]] for layer, level in changes])
    cost = np.array([np.subtract(costs[layer][level], costs[layer][levels[layer]]) for layer, level in changes])
    slack = np.subtract(limits, np.sum([costs[layer][level] for layer, level in levels.items()], axis=0))
    # A change alone, then all pairs of changes in different layers.
    (single,) = np.nonzero(np.all(cost <= slack, axis=1))
    is_pair = np.triu(layers[:, np.newaxis] != layers)
    for kind, limit in enumerate(slack):
        is_pair &= cost[:, np.newaxis, kind] + cost[:, kind] <= limit
    first, second = np.nonzero(is_pair)
    order = np.argsort(np.concatenate([damage[single], damage[first] + damage[second]]), kind="stable")
    for number in order:
        pair = number - len(single)
        indices = (single[number],) if pair < 0 else (first[pair], second[pair])
        yield levels | dict(changes[index] for index in indices)


def _list_other_levels(layer, levels, costs, damages):
    """The levels to which a layer may change: all, or in networks of many layers those of the most similar bytes."""
    others = [level for level in damages[layer] if level != levels[layer]]
    number = max(2, _MOST_CHANGES // len(damages))
    if len(others) <= number:
        return others
    (size, *_) = costs[layer][levels[layer]]
    return sorted(others, key=lambda level: abs(costs[layer][level][0] - size))[:number]
