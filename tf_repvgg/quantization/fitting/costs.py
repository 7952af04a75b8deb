"""Costs of the levels of each layer on a target, and the cost of a whole file."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tf_repvgg import tflite
from tf_repvgg.quantization.codebooks import NUMBERS_OF_CLUSTERS
from tf_repvgg.quantization.fitting.assignment import Level
from tf_repvgg.quantization.uniform import GRANULARITIES, WEIGHT_BITS
from tf_repvgg.tflite import targets
from tf_repvgg.tflite.targets import ethos_u, tflm_lut

# A float32 scale and an int64 zero point, which TFLite stores for each channel of the weights and of the bias.
_SCALE_BYTES = 4 + 8
# The DECODE operator of a layer, with its tensors.
_DECODE_BYTES = 200
# Levels worth trying: the damage changes little from one to the next.
_CLUSTERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, NUMBERS_OF_CLUSTERS[-1])
# Of two levels of a granularity whose bytes differ by less than this share, the one with fewer clusters is left out.
_WORTHWHILE = 0.02


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a layer's kernel.

    Attributes:
      weights: Number of weights.
      channels: Number of output channels.
    """

    weights: int
    channels: int


@dataclasses.dataclass(frozen=True)
class FitTarget:
    """A target for which networks are fitted.

    Attributes:
      numbers: {kind of grid: numbers of clusters or bits that differ in cost on this target}.
      estimate: Function (shape, kind of grid, level) -> bytes of a layer; None if the target's compiler decides.
      costs: {field of `Budget`: key in the target's record}; "latency" stands for a measurement in LiteRT.
      needs_compression: Whether the target refuses files in which no layer is compressed.
    """

    numbers: Mapping[str, tuple[int, ...]]
    estimate: Callable[[Shape, str, Level], int] | None
    costs: Mapping[str, str]
    needs_compression: bool = False


def _add_scales(weight_bytes, shape, level, copies=2):
    """The bytes of the weights, and of the scales that TFLite stores `copies` times."""
    return weight_bytes + (_SCALE_BYTES * copies * (shape.channels if level.per_channel else 1))


def _estimate_int8(shape, _, level):
    return _add_scales(shape.weights, shape, level)


def _estimate_int4(shape, _, level):
    return _add_scales(shape.weights if level.number > 4 else -(-shape.weights // 2), shape, level)


def _estimate_lut(shape, grid, level):
    codes = level.number if grid == "codebook" else 2**level.number - 1
    _, packed_bytes = tflm_lut.compute_size(shape.weights, codes, shape.channels if level.per_channel else 1)
    if packed_bytes >= shape.weights:
        return _estimate_int8(shape, grid, level)
    return _add_scales(packed_bytes, shape, level, copies=3) + _DECODE_BYTES


FIT_TARGETS = {
    "tflm_lut": FitTarget(
        {"codebook": _CLUSTERS, "uniform": tuple(WEIGHT_BITS)},
        _estimate_lut,
        {"file_bytes": "file_bytes", "arena_bytes": "arena_bytes"},
        needs_compression=True,
    ),
    "litert_int8": FitTarget(
        {"codebook": _CLUSTERS[-1:], "uniform": tuple(WEIGHT_BITS[-1:])},
        _estimate_int8,
        {"file_bytes": "file_bytes", "time_ms": "latency"},
    ),
    "litert_int4": FitTarget(
        {"uniform": (4, 8)}, _estimate_int4, {"file_bytes": "file_bytes", "time_ms": "latency"}, needs_compression=True
    ),
} | {
    name.replace("-", "_"): FitTarget(
        {"codebook": _CLUSTERS, "uniform": tuple(WEIGHT_BITS)},
        None,
        {"file_bytes": "file_bytes", "arena_bytes": "sram_bytes", "time_ms": "inference_ms_estimated"},
    )
    for name in ethos_u.ACCELERATORS
    if name.startswith("ethos-u55")
}


def list_levels(target: str, grid: str, granularities: Collection[str]) -> list[Level]:
    """The levels of a target, from cheap to expensive in each granularity.

    Args:
      target: Name in `FIT_TARGETS`.
      grid: Kind of grid.
      granularities: Names of granularities to use.

    Raises:
      ValueError: If the target stores no grids of that kind.
    """
    numbers = FIT_TARGETS[target].numbers
    if grid not in numbers:
        raise ValueError(
            f"target {target} stores no codebooks; use a method with {' or '.join(numbers)} grids, such as adaquant"
        )
    return [
        Level(number, name == "per_channel")
        for name in GRANULARITIES
        if name in granularities
        for number in numbers[grid]
    ]


def drop_similar(costs: Mapping[Level, Any]) -> list[Level]:
    """The levels that are worthwhile: a smaller number of clusters must save bytes.

    Args:
      costs: {level: cost, bytes first}.

    Example:
      >>> from tf_repvgg.quantization.fitting import Level
      >>> from tf_repvgg.quantization.fitting.costs import drop_similar
      >>> costs = {Level(3, False): [1000], Level(4, False): [1001], Level(8, False): [1500]}
      >>> [level.number for level in drop_similar(costs)]
      [4, 8]
    """
    kept: list[Level] = []
    for level in sorted(costs, reverse=True):
        larger = [other for other in kept if other.per_channel == level.per_channel]
        if all(costs[level][0] < (1 - _WORTHWHILE) * costs[other][0] for other in larger):
            kept.append(level)
    return kept[::-1]


def read_operator_costs(record: Mapping[str, Any], names: Collection[str]) -> dict[str, list[float]]:
    """The costs of each layer that Vela has estimated: [bytes in flash, milliseconds].

    Args:
      record: Record of an Ethos-U target.
      names: Names of layers.
    """
    ms_per_cycle = record["inference_ms_estimated"] / record["cycles_estimated"]
    costs = {name: [0.0, 0.0] for name in names}
    for entry in record["layers"]:
        # An operator's name holds those of the operations that were merged into it, with semicolons between them.
        parts = entry["operator"].split(";")
        matches = [name for name in names if any(part.startswith(f"{name}/") for part in parts)]
        if matches:
            cost = costs[max(matches, key=len)]
            cost[0] += entry["flash_bytes"]
            cost[1] += entry["cycles_estimated"] * ms_per_cycle
    return costs


def measure(target: str, file: bytes, fields: Collection[str]) -> tuple[targets.Built, dict[str, float]]:
    """Builds a file for a target and measures it.

    Args:
      target: Name in `FIT_TARGETS`.
      file: Integer file.
      fields: Fields of `Budget` to measure beside the bytes.

    Returns:
      The result of building the file, and {field: cost}.

    Raises:
      ValueError: If the target refuses the file.
    """
    built = targets.TARGETS[target](file)
    costs: dict[str, float] = {}
    for field, key in FIT_TARGETS[target].costs.items():
        if key != "latency":
            costs[field] = built.record[key]
        elif field in fields:
            costs[field] = tflite.latency(built.in_litert or file).p50_ms
    return built, costs
