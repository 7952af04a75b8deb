"""Choosing a level for each layer by integer programming, from damages and costs that add up."""

from collections.abc import Mapping, Sequence

import numpy as np

from tf_repvgg.quantization.fitting.assignment import Level

Damages = Mapping[str, Mapping[Level, float]]
Costs = Mapping[str, Mapping[Level, Sequence[float]]]


def choose(damages: Damages, costs: Costs, limits: Sequence[float]) -> dict[str, Level] | None:
    """Chooses the levels with the smallest sum of damages whose sums of costs stay within their limits; exact.

    Args:
      damages: {layer: {level: damage}}.
      costs: {layer: {level: cost of each kind}}; each kind has a limit.
      limits: Limit of each kind of cost; infinity for none.

    Returns:
      {layer: level}; None if no choice is within the limits.

    Example:
      >>> from tf_repvgg.quantization.fitting import Level
      >>> from tf_repvgg.quantization.fitting.choice import choose
      >>> small, large = Level(4, False), Level(16, False)
      >>> damages = {"stem": {small: 9.0, large: 1.0}, "logits": {small: 2.0, large: 1.0}}
      >>> costs = {"stem": {small: [10], large: [20]}, "logits": {small: [30], large: [60]}}
      >>> {layer: level.number for layer, level in choose(damages, costs, [50]).items()}
      {'stem': 16, 'logits': 4}
    """
    from scipy import optimize  # takes a third of a second

    pairs = [(layer, level) for layer, levels in damages.items() for level in levels]
    layers = list(damages)
    one_level = np.array([[float(layer == name) for layer, _ in pairs] for name in layers])
    constraints = [optimize.LinearConstraint(one_level, 1, 1)]
    for kind, limit in enumerate(limits):
        if np.isfinite(limit):
            row = np.array([[costs[layer][level][kind] for layer, level in pairs]], float)
            scale = max(limit, 1.0)
            constraints.append(optimize.LinearConstraint(row / scale, -np.inf, limit / scale))
    objective = np.array([damages[layer][level] for layer, level in pairs])
    solution = optimize.milp(
        objective / (np.max(objective) or 1.0),
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        return None
    return {layer: level for (layer, level), share in zip(pairs, solution.x, strict=True) if share > 0.5}
