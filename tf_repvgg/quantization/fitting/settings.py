"""Settings of a fit that go together or not whatever the network is, and costs in words."""

from collections.abc import Collection, Mapping

from tf_repvgg.quantization.fitting.assignment import Level
from tf_repvgg.quantization.fitting.budget import Budget
from tf_repvgg.quantization.fitting.costs import FIT_TARGETS, list_levels
from tf_repvgg.quantization.uniform import GRANULARITIES

# {method of post-training quantization: kind of its grids}
FIT_METHODS = {
    "codebook": "codebook",
    "codebook_adaquant": "codebook",
    "adaquant": "uniform",
    "octav": "uniform",
    "mse": "uniform",
}
# {kind of grid: method without learning, by whose kernels levels are compared}
START_METHODS = {"codebook": "codebook", "uniform": "mse"}
# Names of costs in messages: {field of `Budget`: (name, format)}.
_COST_NAMES = {
    "file_bytes": ("a file", "{:,.0f} bytes"),
    "arena_bytes": ("an arena", "{:,.0f} bytes"),
    "time_ms": ("a time", "{:.3f} ms"),
}


def check_settings(target: str, method: str, granularities: Collection[str]) -> list[Level]:
    """Checks settings that go together or not whatever the network is.

    Args:
      target: Name of a target.
      method: Name of a method.
      granularities: Names of granularities.

    Returns:
      The levels that the target offers.

    Raises:
      ValueError: If one is unknown, or the target cannot store what the method makes.
    """
    if target not in FIT_TARGETS:
        raise ValueError(f"no network can be fitted for the target {target!r}; known: {', '.join(FIT_TARGETS)}")
    if method not in FIT_METHODS:
        raise ValueError(f"no network can be fitted by the method {method!r}; known: {', '.join(FIT_METHODS)}")
    unknown = [name for name in granularities if name not in GRANULARITIES]
    if unknown or not granularities:
        raise ValueError(f"granularities are {', '.join(granularities)!r}; known: {', '.join(GRANULARITIES)}")
    return list_levels(target, FIT_METHODS[method], granularities)


def check_budget(budget: str | Budget, target: str) -> Budget:
    """Reads a budget, and checks that the target reports its costs.

    Args:
      budget: Budget, or its text.
      target: Name in `FIT_TARGETS`.

    Raises:
      ValueError: If the text is no budget, or the target does not report one of its costs.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    reported = {field: _COST_NAMES[field][0].partition(" ")[2] for field in FIT_TARGETS[target].costs}
    for field in budget.limits():
        if field not in reported:
            raise ValueError(
                f"target {target} does not report {_COST_NAMES[field][0]}; a budget for it may hold: "
                f"{', '.join(reported.values())}"
            )
    return budget


def describe_costs(costs: Mapping[str, float], fields: Collection[str] | None = None) -> str:
    """Costs in words: "a file of 256,000 bytes and a time of 5.000 ms".

    Args:
      costs: {field of `Budget`: cost}.
      fields: Fields to name; by default all.
    """
    return " and ".join(
        f"{name} of {template.format(costs[field])}"
        for field, (name, template) in _COST_NAMES.items()
        if field in costs and field in (costs if fields is None else fields)
    )
