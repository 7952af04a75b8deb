"""Fitting: damages and costs of each layer's levels, measured once, and assignments for any number of budgets."""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import tf_keras as keras

from tf_repvgg import graph, provenance, storage, tflite
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.checks import check_fused
from tf_repvgg.quantization.exportability import check_exportable
from tf_repvgg.quantization.fitting import costs as target_costs
from tf_repvgg.quantization.fitting.assignment import GRIDS, Assignment, FittedLayer, Level
from tf_repvgg.quantization.fitting.budget import Budget, BudgetError
from tf_repvgg.quantization.fitting.choice import choose
from tf_repvgg.quantization.fitting.costs import FIT_TARGETS, Shape
from tf_repvgg.quantization.fitting.outputs import OutputError
from tf_repvgg.quantization.fitting.search import Levels, fits, search
from tf_repvgg.quantization.fitting.settings import (
    FIT_METHODS,
    START_METHODS,
    check_budget,
    check_settings,
    describe_costs,
)
from tf_repvgg.quantization.lowering import lower
from tf_repvgg.quantization.ptq.methods.codebook import cluster_kernel, compute_importance
from tf_repvgg.quantization.ptq.methods.mse import search_grid
from tf_repvgg.quantization.ptq.walk import Walk
from tf_repvgg.quantization.samples import read_samples, stack_samples
from tf_repvgg.quantization.uniform import GRANULARITIES, QuantizedKernel
from tf_repvgg.tflite import targets

# Fields of `Budget` that the costs of levels add up to, in the order of `Fitter.costs`; the arena is a maximum.
_ESTIMATED = ("file_bytes", "time_ms")
# A file that is larger than estimated is chosen anew, with what it teaches, so many times.
_LARGEST_ROUNDS = 8
# Number of uniform choices that the local search starts from, beside the exact one.
_UNIFORM_STARTS = 2


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted network and its file.

    Attributes:
      assignment: Level of each layer, and the measured costs.
      network: Network of post-training quantization, with its quantized form and notes.
      file: The integer file.
      built: Result of building the file for the target.
      record: Description of the search, for JSON.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.fitting import Fitter
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, name="conv")])
      >>> fitted = Fitter(model, "litert_int8", np.ones([4, 8, 8, 3], np.float32), "mse").fit("weights:1MB")
      >>> len(fitted.file) == fitted.assignment.measured["file_bytes"]
      True
    """

    assignment: Assignment
    network: ptq.Network
    file: bytes
    built: targets.Built
    record: dict[str, Any]


class Fitter:
    """Chooses levels for budgets; what it has measured of the layers serves all of them.

    Args:
      model: Fused functional model.
      target: Name in `FIT_TARGETS`.
      calibration: Images without labels, as for `ptq.quantize`.
      method: Name in `FIT_METHODS`.
      granularities: Names of the granularities to choose from.
      evaluations: Largest number of whole networks that the local search measures; 0 takes the exact choice as it is.
      finished_work: Keeps the damages of finished layers, so that an interrupted search continues there; None does not.
      file_options: Keyword arguments of `tflite.convert`, such as the inference type.
      **options: Fields of `ptq.Options`.

    Attributes:
      damages: {layer: {level: damage}}.
      costs: {layer: {level: [bytes, milliseconds]}}, as estimated.
      evaluations: Largest number of networks that a search measures.

    Raises:
      ValueError: If target, method, granularities and model do not go together, and as `ptq.quantize`.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.fitting import Fitter, Level
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, name="conv")])
      >>> fitter = Fitter(model, "litert_int4", np.ones([4, 8, 8, 3], np.float32), "mse", ["per_tensor"])
      >>> fitter.costs["conv"][Level(4, False)][0] < fitter.costs["conv"][Level(8, False)][0]
      True
    """

    def __init__(
        self,
        model: keras.Model,
        target: str,
        calibration: Any,
        method: str = "codebook",
        granularities: Collection[str] = tuple(GRANULARITIES),
        *,
        evaluations: int = 40,
        finished_work: storage.FinishedWork | None = None,
        file_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        levels = check_settings(target, method, granularities)
        check_fused(model)
        self.target, self.method, self.grid = target, method, FIT_METHODS[method]
        self.evaluations, self._options = evaluations, options
        self._file_options = dict(file_options or {})
        images = stack_samples(read_samples(calibration, model))
        self._model, self._calibration = model, dict(zip(graph.input_names(model), images, strict=True))
        lowered = lower(model)
        check_exportable(lowered, ptq.Options(**options).activation_bits)
        self._network = ptq.Network(lowered, images, ptq.bits_by_layer(lowered, 8), True, ptq.Options(**options))
        self._shapes = {
            name: Shape(self._network.kernel(name).size, len(self._network.bias(name))) for name in self._network.layers
        }
        self._kernels: dict[tuple[str, Level], QuantizedKernel] = {}
        self.costs = self._estimate_costs(levels)
        self.damages = self._measure_damages(finished_work)

    @functools.cached_property
    def _outputs(self) -> OutputError:
        return OutputError(self._network.float, self._network.calibration)

    @functools.cached_property
    def _importances(self) -> dict[str, np.ndarray]:
        """{layer: importance of its weights}; of uniform grids all weights count alike."""
        network = self._network
        called_once = [name for name in network.layers if not network.is_shared(name)]
        walk = Walk(network.calibration, network.float, [network.layers[name].input for name in called_once])
        return {
            name: compute_importance(
                walk.compute(layer.input) if name in called_once else None, network.kernel(name).shape
            )
            for name, layer in network.layers.items()
        }

    def find_kernel(self, name: str, level: Level) -> QuantizedKernel:
        """The kernel of a layer at a level, without learning.

        Args:
          name: Name of the layer.
          level: Level.
        """
        if (name, level) not in self._kernels:
            kernel = self._network.kernel(name)
            if self.grid == "codebook":
                quantized = cluster_kernel(kernel, self._importances[name], level.number, level.per_channel)
            else:
                quantized = search_grid(kernel, level.number, level.per_channel)
            self._kernels[name, level] = quantized
        return self._kernels[name, level]

    def measure_error(self, levels: Levels) -> float:
        """The error of the outputs with all layers at their levels; activations stay float.

        Args:
          levels: {layer: level}.
        """
        return self._outputs.measure({name: self.find_kernel(name, level) for name, level in levels.items()})

    def _estimate_costs(self, levels) -> dict[str, dict[Level, list[float]]]:
        estimate = FIT_TARGETS[self.target].estimate
        if estimate is not None:
            costs = {
                name: {level: [float(estimate(shape, self.grid, level)), 0.0] for level in levels}
                for name, shape in self._shapes.items()
            }
        else:
            costs = {name: {} for name in self._shapes}
            for level in self._network.show_progress(levels, f"levels compiled for {self.target}", "level"):
                record = self.build(dict.fromkeys(self._shapes, level), START_METHODS[self.grid]).built.record
                for name, cost in target_costs.read_operator_costs(record, list(self._shapes)).items():
                    costs[name][level] = cost
        return {
            name: {level: by_level[level] for level in target_costs.drop_similar(by_level)}
            for name, by_level in costs.items()
        }

    def _measure_damages(self, work) -> dict[str, dict[Level, float]]:
        inputs = self._describe_inputs() if work else {}
        damages: dict[str, dict[Level, float]] = {}
        for name in self._network.show_progress(self._shapes, "damages of levels"):
            levels = list(self.costs[name])
            key = inputs | {"layer": name, "levels": [str(level) for level in levels]}
            result = work.find(f"damages/{len(damages)}", key) if work else None
            if result is None:
                kernels = [self.find_kernel(name, level) for level in levels]
                result = {"damages": self._outputs.measure_each(name, kernels)}
                if work:
                    work.keep(f"damages/{len(damages)}", key, result)
            damages[name] = dict(zip(levels, result["damages"], strict=True))
        return damages

    def _describe_inputs(self):
        """Everything that damages depend on beside layer and levels, JSON-serializable."""
        model_hash = hashlib.sha256(self._network.float.to_json().encode())
        for array in (*self._network.float.get_weights(), *self._calibration.values()):
            model_hash.update(np.ascontiguousarray(array).tobytes())
        return {"grid": self.grid, "data_sha256": model_hash.hexdigest(), "sources_sha256": provenance.sources_sha256()}

    def fit(self, budget: str | Budget) -> Fitted:
        """Finds the levels with the smallest error within a budget; writes the file and measures that it fits.

        Args:
          budget: Largest costs, or their text; see `Budget.parse`.

        Raises:
          BudgetError: If no choice is within the budget; names the smallest that can be met.
          ValueError: If the target does not report a cost of the budget.
        """
        limits = check_budget(budget, self.target).limits()
        started = time.monotonic()
        allowed = {name: list(levels) for name, levels in self.costs.items()}
        offsets = self.compare_with_estimate(self.smallest)
        self._check_arena(limits)
        for _ in range(_LARGEST_ROUNDS):
            levels, record = self._choose(limits, offsets, allowed)
            self._check_compression(levels, limits)
            fitted = self.build(levels, fields=limits)
            measured = fitted.assignment.measured
            exceeded = [field for field, limit in limits.items() if measured[field] > limit]
            if not exceeded:
                assignment = self._describe(levels, record["error"], measured)
                record = {"budget": limits, **record, "seconds": round(time.monotonic() - started, 1)}
                return dataclasses.replace(fitted, assignment=assignment, record=record)
            if "arena_bytes" in exceeded:
                self._leave_uncompressed(allowed, fitted, limits)
            offsets = self.compare_with_estimate(fitted)
        raise BudgetError(f"{describe_costs(limits)} was missed: the last file has {describe_costs(measured, limits)}")

    def _check_arena(self, limits):
        """Refuses arenas that not even the file without compression has, whose arena is the smallest."""
        smallest = self.smallest.built.record.get("arena_bytes_of_int8_file", 0)
        if limits.get("arena_bytes", smallest) < smallest:
            raise BudgetError(
                f"{describe_costs(limits)} cannot be met on {self.target}: the smallest arena, with 8 bits in each "
                f"layer, has {smallest:,} bytes"
            )

    def _check_compression(self, levels, limits):
        """Refuses budgets within which nothing needs to be compressed, if the target is for compressed files only."""
        target = FIT_TARGETS[self.target]
        largest = target.numbers[self.grid][-1]
        if target.needs_compression and all(level.number == largest for level in levels.values()):
            size = f"{self.estimate_bytes(levels):,} bytes"
            raise BudgetError(
                f"{describe_costs(limits)} leaves room for 8 bits in each layer, {size}; take the target litert_int8"
            )

    def estimate_bytes(self, levels: Levels) -> int:
        """The bytes of the target's file, as estimated.

        Args:
          levels: {layer: level in `costs`}.
        """
        graph_bytes = self.compare_with_estimate(self.smallest)["file_bytes"]
        return round(graph_bytes + sum(self.costs[name][level][0] for name, level in levels.items()))

    def _choose(self, limits, offsets, allowed):
        """Levels within the limits, and a record of the search."""
        cost_limits = [limits.get(field, math.inf) - offsets[field] for field in _ESTIMATED]
        damages = {name: {level: self.damages[name][level] for level in levels} for name, levels in allowed.items()}
        exact = choose(damages, self.costs, cost_limits)
        if exact is None:
            raise BudgetError(
                f"{describe_costs(limits)} cannot be met on {self.target}: the smallest choice, "
                f"{self._describe_smallest(allowed)}, is {self._estimate_smallest(allowed, offsets, limits)}"
            )
        starts = [exact]
        for level in set.intersection(*map(set, allowed.values())):
            uniform = dict.fromkeys(allowed, level)
            if self.evaluations and fits(uniform, self.costs, cost_limits):
                starts.append(uniform)
        # Of uniform choices, the best few by sum of damages.
        starts = starts[:1] + sorted(starts[1:], key=self.sum_damages)[:_UNIFORM_STARTS]
        levels, error = search(starts, damages, self.costs, cost_limits, self.measure_error, self.evaluations)
        return levels, {
            "sum_of_damages": self.sum_damages(levels),
            "error_of_exact_choice": self.measure_error(exact) if levels != exact else error,
            "error": error,
        }

    def sum_damages(self, levels: Levels) -> float:
        """The sum of the damages of all layers.

        Args:
          levels: {layer: level}.
        """
        return sum(self.damages[name][level] for name, level in levels.items())

    def compare_with_estimate(self, fitted: Fitted) -> dict[str, float]:
        """The measured less the estimated cost of a file, by field of `Budget`.

        Args:
          fitted: Network whose levels are in `costs`.
        """
        levels, measured = fitted.assignment.levels, fitted.assignment.measured
        return {
            field: measured[field] - sum(self.costs[name][level][kind] for name, level in levels.items())
            if field in measured
            else 0.0
            for kind, field in enumerate(_ESTIMATED)
        }

    @functools.cached_property
    def smallest(self) -> Fitted:
        """The network with the fewest bytes, quantized without learning."""
        return self.build(self.find_extremes()[0], START_METHODS[self.grid])

    def find_extremes(self) -> tuple[dict[str, Level], dict[str, Level]]:
        """The levels with the fewest bytes, and those with the largest numbers and then the fewest bytes."""
        smallest = {name: min(costs, key=lambda level: costs[level][0]) for name, costs in self.costs.items()}
        largest = {
            name: min(costs, key=lambda level: (-level.number, costs[level][0])) for name, costs in self.costs.items()
        }
        return smallest, largest

    def _leave_uncompressed(self, allowed, fitted, limits):
        """Bars the levels that make the arena large: TFLite Micro unpacks a compressed layer there."""
        compressed = [
            name
            for name, level in fitted.assignment.levels.items()
            if self.target == "tflm_lut" and self.costs[name][level][0] < self._shapes[name].weights
        ]
        if not compressed:
            needed = describe_costs(fitted.assignment.measured, ["arena_bytes"])
            raise BudgetError(f"{describe_costs(limits)} cannot be met on {self.target}: the network needs {needed}")
        largest = max(compressed, key=lambda name: self._shapes[name].weights)
        allowed[largest] = [
            level for level in allowed[largest] if self.costs[largest][level][0] >= self._shapes[largest].weights
        ]

    def _describe_smallest(self, allowed):
        numbers = {min(levels, key=lambda level: self.costs[name][level][0]).number for name, levels in allowed.items()}
        low, high = min(numbers), max(numbers)
        return f"{low if low == high else f'{low} to {high}'} {GRIDS[self.grid][1]} in each layer"

    def _estimate_smallest(self, allowed, offsets, limits):
        sums = {
            field: offsets[field]
            + sum(min(self.costs[name][level][kind] for level in levels) for name, levels in allowed.items())
            for kind, field in enumerate(_ESTIMATED)
        }
        return describe_costs(sums, limits)

    def _describe(self, levels, error, measured):
        layers = tuple(
            FittedLayer(
                name,
                shape.weights,
                levels[name],
                round(self.costs[name][levels[name]][0]),
                self.damages[name][levels[name]],
            )
            for name, shape in self._shapes.items()
        )
        return Assignment(self.grid, self.target, layers, error, measured)

    def build(self, levels: Levels, method: str | None = None, fields: Collection[str] = ()) -> Fitted:
        """Quantizes the network with any levels, writes the file for the target, and measures it.

        Args:
          levels: {layer: level}.
          method: Name in `FIT_METHODS`; by default that of the fitter.
          fields: Fields of `Budget` to measure beside those that the target reports.

        Raises:
          ValueError: If the target refuses the file.
        """
        layers = tuple(FittedLayer(name, shape.weights, levels[name], 0, 0.0) for name, shape in self._shapes.items())
        assignment = Assignment(self.grid, self.target, layers, math.nan)
        network = ptq.quantize_network(
            self._model,
            method or self.method,
            per_channel=assignment.per_channel,
            calibration=self._calibration,
            **assignment.numbers,
            **self._options,
        )
        file = tflite.convert(network.quantized, **self._file_options)
        built, measured = target_costs.measure(self.target, file, fields)
        return Fitted(dataclasses.replace(assignment, measured=measured), network, file, built, {})
