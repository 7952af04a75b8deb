"""Assignments: for each layer its number of clusters or bits, and its granularity."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

from tf_repvgg.quantization.uniform import GRANULARITIES

# {kind of grid: (flag of train/main.py that takes its numbers, heading)}
GRIDS = {"codebook": ("number_of_clusters", "clusters"), "uniform": ("weight_bits", "bits")}


@dataclasses.dataclass(frozen=True, order=True)
class Level:
    """A form in which the weights of a layer can be stored.

    Attributes:
      number: Number of clusters of a codebook, or bits of a uniform grid.
      per_channel: Whether each output channel has a codebook or a scale of its own.

    Example:
      >>> from tf_repvgg.quantization.fitting import Level
      >>> str(Level(4, per_channel=False))
      '4 per tensor'
    """

    number: int
    per_channel: bool

    @property
    def granularity(self) -> str:
        """Name of the granularity, as in flags."""
        return "per_channel" if self.per_channel else "per_tensor"

    def __str__(self) -> str:
        return f"{self.number} {GRANULARITIES[self.granularity]}"


@dataclasses.dataclass(frozen=True)
class FittedLayer:
    """A layer of an assignment.

    Attributes:
      name: Name of the layer.
      weights: Number of weights.
      level: Form in which the weights are stored.
      cost_bytes: Bytes of the weights and their tables or scales on the target, as estimated.
      damage: Error of the network's outputs if this layer alone has its level; see `OutputError`.

    Example:
      >>> from tf_repvgg.quantization.fitting import FittedLayer, Level
      >>> FittedLayer("stem", 864, Level(4, False), 236, 0.01).level.number
      4
    """

    name: str
    weights: int
    level: Level
    cost_bytes: int
    damage: float


@dataclasses.dataclass(frozen=True)
class Assignment(Mapping[str, int]):
    """The number of clusters or bits of each layer: a mapping {pattern of its name: number}.

    `tf_repvgg.quantization.ptq.quantize` takes it as `number_of_clusters` or `weight_bits`, and its `per_channel` as
    `per_channel`; `cluster_quantize` and `learned_step_quantize` do too. It prints as a table.

    Attributes:
      grid: Kind of grid: "codebook" or "uniform".
      target: Name of the target that it is for.
      layers: Layers, in execution order.
      error: Error of the network's outputs with all layers at their levels.
      measured: Costs of the target's file, by field of `Budget`; empty before it is measured.

    Example:
      >>> from tf_repvgg.quantization.fitting import Assignment, FittedLayer, Level
      >>> stem = FittedLayer("stem", 864, Level(16, per_channel=True), cost_bytes=440, damage=0.01)
      >>> logits = FittedLayer("fc", 640, Level(4, per_channel=False), cost_bytes=180, damage=0.02)
      >>> assignment = Assignment("codebook", "tflm_lut", (stem, logits), error=0.03)
      >>> dict(assignment), assignment.per_channel
      ({'stem': 16, 'fc': 4}, {'stem': True, 'fc': False})
      >>> print(assignment)
      layer      weights    clusters  granularity      bytes    damage
      -------  ---------  ----------  -------------  -------  --------
      stem           864          16  per channel        440    0.0100
      fc             640           4  per tensor         180    0.0200
      total        1,504                                 620    0.0300
    """

    grid: str
    target: str
    layers: tuple[FittedLayer, ...]
    error: float
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __getitem__(self, pattern: str) -> int:
        return next(layer.level.number for layer in self.layers if re.escape(layer.name) == pattern)

    def __iter__(self) -> Iterator[str]:
        return (re.escape(layer.name) for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def per_channel(self) -> dict[str, bool]:
        """{pattern of a layer's name: whether each output channel has a codebook or scale of its own}."""
        return {re.escape(layer.name): layer.level.per_channel for layer in self.layers}

    @property
    def levels(self) -> dict[str, Level]:
        """{layer name: level}."""
        return {layer.name: layer.level for layer in self.layers}

    @property
    def numbers(self) -> dict[str, "Assignment"]:
        """The argument of `ptq.quantize` that takes this assignment: {"number_of_clusters" or "weight_bits": self}."""
        return {GRIDS[self.grid][0]: self}

    def as_flags(self) -> str:
        """The content of a flagfile for train/main.py, with --quantize=clusterqat or --quantize=lsq."""
        flag, _ = GRIDS[self.grid]
        numbers = ",".join(f"{pattern}={number}" for pattern, number in self.items())
        granularities = ",".join(f"{re.escape(layer.name)}={layer.level.granularity}" for layer in self.layers)
        return f"--{flag}={numbers}\n--granularity={granularities}\n"

    def as_record(self) -> dict[str, Any]:
        """The assignment for JSON."""
        layers = [
            {
                "layer": layer.name,
                "weights": layer.weights,
                GRIDS[self.grid][1]: layer.level.number,
                "granularity": layer.level.granularity,
                "bytes": layer.cost_bytes,
                "damage": layer.damage,
            }
            for layer in self.layers
        ]
        return {"target": self.target, "layers": layers, "error": self.error, **self.measured}

    def __str__(self) -> str:
        rows = [
            [
                layer.name,
                f"{layer.weights:,}",
                layer.level.number,
                GRANULARITIES[layer.level.granularity],
                f"{layer.cost_bytes:,}",
                f"{layer.damage:.4f}",
            ]
            for layer in self.layers
        ]
        weights, cost_bytes = (sum(getattr(layer, key) for layer in self.layers) for key in ("weights", "cost_bytes"))
        rows.append(["total", f"{weights:,}", "", "", f"{cost_bytes:,}", f"{self.error:.4f}"])
        headers = ["layer", "weights", GRIDS[self.grid][1], "granularity", "bytes", "damage"]
        alignment = ("left", "right", "right", "left", "right", "right")
        return tabulate(rows, headers, disable_numparse=True, colalign=alignment)
