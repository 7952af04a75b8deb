"""The JSON files in results/, each as an object that answers the template's questions about its numbers."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from harness.any_model import page as any_model_page
from harness.any_model.applications import NETWORKS
from harness.commands import ROOT
from harness.low_bit.fine_tunings import Setting
from harness.low_bit.methods import LEARNING_RATES
from harness.low_bit.models import OABN_MODELS, OTHER_MODELS
from harness.oabn_limit.codebook_trainings import CLUSTERS, average
from harness.pages import recipes
from harness.ptq import page as ptq_page
from harness.ptq.cells import AI_EDGE
from harness.reliability import page as reliability_page
from tf_repvgg.quantization.uniform import GRANULARITIES


def load_results(folder: Path) -> dict[str, dict]:
    """Contents of the JSON files in a folder by name."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def read_json(path: Path) -> dict:
    """Content of one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def name_machines(machines: Iterable[Mapping]) -> str:
    """The machines of several measurements in words, each once."""
    names = {f"{shorten_cpu(machine['cpu'])}, {machine['cores']} cores" for machine in machines}
    return "; ".join(sorted(names))


def shorten_cpu(cpu: str) -> str:
    """A processor's name without trademarks."""
    return cpu.replace("(R)", "").replace(" Processor", "")


class Exports:
    """Models that export/main.py has quantized by min-max: min_max.json, and the models of demo.json.

    Args:
      models: {title: {"training": result.json, "export": export.json}}.
    """

    def __init__(self, models: Mapping[str, Mapping]) -> None:
        self.exports = {title: model["export"] for title, model in models.items()}
        self._trainings = {title: model["training"] for title, model in models.items()}
        self.machine = name_machines(export["machine"] for export in self.exports.values())
        self.images = next(iter(self.exports.values()))["images"]

    def fp32(self, title: str) -> float:
        """FP32 top-1."""
        return self.exports[title]["float_fused_top1_percent"]

    def top1(self, title: str, bits: int, granularity: str) -> float:
        """Integer top-1."""
        (file,) = (
            file
            for file in self.exports[title]["files"]
            if (file["weight_bits"], file["granularity"]) == (bits, granularity)
        )
        return file["top1_percent"]

    def drop(self, title: str, bits: int, granularity: str) -> float:
        """FP32 top-1 minus integer top-1."""
        return self.fp32(title) - self.top1(title, bits, granularity)

    def best_other(self, title: str, bits: int, granularity: str) -> float:
        """The best integer top-1 of the other models."""
        return max(self.top1(other, bits, granularity) for other in self.exports if other != title)

    def is_best(self, title: str, widths: Iterable[int], granularity: str) -> bool:
        """Whether a model is the best of all at all widths."""
        return all(self.top1(title, bits, granularity) > self.best_other(title, bits, granularity) for bits in widths)

    def outlier(self, title: str) -> float:
        """The largest merged weight over the standard deviation of its layer, largest over the layers."""
        return max(layer["outlier_ratio"] for layer in self.exports[title]["outliers"])

    def minutes(self, title: str) -> float:
        """Training time."""
        return self._trainings[title]["training_seconds"] / 60


class Int8Collapse:
    """int8_collapse.json."""

    def __init__(self, record: Mapping) -> None:
        self.models = record["models"]
        self.machine = name_machines(model["training"]["machine"] for model in self.models.values())
        self.epochs = record["epochs"] or self.flag("BN", "epochs")

    def flag(self, title: str, name: str) -> str:
        """The value of a flag in a model's config."""
        lines = (ROOT / self.models[title]["config"]).read_text(encoding="utf-8").splitlines()
        (value,) = (line.partition("=")[2] for line in lines if line.startswith(f"--{name}="))
        return value

    def change(self, title: str, granularity: str) -> float:
        """Change from FP32 to int8 in points."""
        return self.models[title]["int8_top1_percent"][granularity] - self.models[title]["float_top1_percent"]

    def change_by_weights(self, title: str, granularity: str) -> float:
        """Change from FP32 to int8 weights with float activations in points."""
        model = self.models[title]
        return model["int8_weights_float_activations_top1_percent"][granularity] - model["float_top1_percent"]

    def outlier(self, title: str) -> float:
        """The largest merged weight over the standard deviation of its layer, largest over the layers."""
        return max(layer["outlier_ratio"] for layer in self.models[title]["layers"].values())

    def variance(self, title: str, layer: str) -> float:
        """Variance of a layer's activations, mean over its channels."""
        return self.models[title]["layers"][layer]["variance_mean"]

    def share_of_tiny_variances(self) -> float:
        """Largest share of running variances below epsilon, over all layers of all models."""
        layers = (layer for model in self.models.values() for layer in model["layers"].values())
        return max(layer["running_variances_below_epsilon_share"] for layer in layers)


class Ptq:
    """ptq.json."""

    def __init__(self, record: Mapping) -> None:
        self.models = record["models"]
        self.machine = name_machines([record["machine"]])
        self.calibration_images = record["settings"]["calibration_images"]
        self.like, self.behind = ptq_page.list_like_cells(self.models)
        self.largest_deficit = ptq_page.LARGEST_DEFICIT

    def fp32(self, model: str) -> float:
        """FP32 top-1."""
        return self.models[model]["float_top1_percent"]

    def top1(self, model: str, method: str, bits: int, granularity: str) -> float:
        """Integer top-1 of one cell."""
        (cell,) = (
            cell
            for cell in self.models[model]["cells"]
            if (cell["method"], cell["weight_bits"], cell["granularity"]) == (method, bits, granularity)
        )
        return cell["top1_percent"]

    def best_pair(self, model: str, methods: Iterable[str], bits: int) -> list[float]:
        """The best integer top-1 of some methods per tensor, and per channel."""
        return [max(self.top1(model, method, bits, kind) for method in methods) for kind in GRANULARITIES]

    def seconds(self, model: str, method: str) -> float:
        """Median time of quantizing one file on one core."""
        cells = (cell for cell in self.models[model]["cells"] if cell["method"] == method)
        return statistics.median(cell["quantization_seconds"] for cell in cells)

    def largest_drop(self, model: str, bits: int, granularity: str) -> float:
        """Drop of the worst of our methods."""
        cells = (
            cell
            for cell in self.models[model]["cells"]
            if (cell["weight_bits"], cell["granularity"]) == (bits, granularity)
            and not cell["method"].startswith(AI_EDGE)
        )
        return self.fp32(model) - min(cell["top1_percent"] for cell in cells)

    def mean_leads(self) -> list[float]:
        """Mean lead over ai-edge-quantizer for each kind of like methods."""
        kinds = dict.fromkeys(cell["kind"] for cell in self.like)
        return [
            statistics.mean(ptq_page.find_lead(cell) for cell in self.like if cell["kind"] == kind) for kind in kinds
        ]


class Targets:
    """targets.json."""

    def __init__(self, record: Mapping) -> None:
        self.machine = name_machines([record["machine"]])
        (file,) = (file for export in record["exports"] for file in export["files"] if "codebook" in file["ptq"])
        self.packed_share = file["targets"]["tflm_lut"]["file_bytes"] / file["file_bytes"]
        self.equal_percent = file["targets"]["tflm_lut"]["equal_to_int8_file_on_same_kernels_percent"]
        self.encoded_share = file["targets"][record["accelerator"]]["encoded_over_raw"]


class LowBit:
    """low_bit.json, and the fine-tunings in low_bit/.

    Args:
      record: Content of low_bit.json.
      folder: Folder of the fine-tunings.
    """

    def __init__(self, record: Mapping, folder: Path) -> None:
        self.parts, self.distill = record, record["choices"]["distill"]
        self.validation_top1 = record["choices"]["validation_top1_percent"]
        self._folder = folder

    def row(self, part: str, method: str, clusters: int, granularity: str, model: str = "OABN") -> Mapping:
        """One row of a part, by its first model."""
        (row,) = (
            row
            for row in self.parts[part]
            if (row["method"], row["states"], row["granularity"], row["models"][0])
            == (method, clusters, granularity, model)
        )
        return row

    def leads(self, clusters: int) -> list[Mapping]:
        """Rows of the peers of ClusterQAT."""
        return [row for row in self.parts["peers"] if row["states"] == clusters and row["method"] != "ClusterQAT"]

    def validation(self, method: str, clusters: int, distilled: bool = True) -> float:
        """Top-1 on validation data, per tensor, at the best learning rate."""
        label = f"{method}, {clusters} states, per tensor"
        return max(self.validation_top1[f"{label}, distilled" if distilled else label].values())

    def pick_validation(self, *starts: str) -> dict[str, Mapping]:
        """Validation results whose labels start with one of some texts."""
        return {label: top1 for label, top1 in self.validation_top1.items() if label.startswith(starts)}

    def gain_of_edges(self, clusters: int) -> list[float]:
        """Points that more clusters for stem and classifier give, per tensor and per channel."""
        return [
            self.row("edges", "ClusterQAT", clusters, kind)["integer_top1_percent"][0]
            - self.row("headline", "ClusterQAT", clusters, kind)["integer_top1_percent"][0]
            for kind in GRANULARITIES
        ]

    def machines(self, part: str, model: str | None = None, **values: object) -> str:
        """Machines of the fine-tunings of some rows.

        Args:
          part: Part of the record.
          model: Title of the only model that counts; None for all.
          **values: Values of the rows' keys.
        """
        machines = []
        for row in self.parts[part]:
            if all(row[key] == value for key, value in values.items()):
                pairs = zip(row["models"], row["learning_rates"], strict=True)
                machines += [self._machine(row, title, rate) for title, rate in pairs if model in (None, title)]
        return name_machines(machines)

    def _machine(self, row, model, optimizer_rate):
        edges = row["stem_and_classifier_states"]
        settings = (
            Setting(
                (OABN_MODELS | OTHER_MODELS)[model],
                row["method"],
                row["states"],
                row["granularity"],
                rate,
                self.distill,
                edge_clusters=edges if edges != row["states"] else None,
            )
            for rate in LEARNING_RATES
        )
        (setting,) = (setting for setting in settings if setting.optimizer_rate == optimizer_rate)
        return read_json(self._folder / f"{setting.name}.json")["machine"]


class AnyModel:
    """any_model.json."""

    def __init__(self, record: Mapping) -> None:
        self.counts = any_model_page.count_outcomes(record["random"])
        self.models, self.ways = record["random"]["models"], len(record["random"]["outcomes"])
        self.faults = any_model_page.list_faults(record)
        self.networks = record["applications"]["networks"]
        self.missing = [name for name in NETWORKS if name not in self.networks]
        self.test_images = record["applications"]["test_images"]
        self.machine = name_machines(record[part]["machine"] for part in ("random", "applications"))

    def percent(self, outcome: str) -> float:
        """Share of an outcome of random models."""
        return 100 * self.counts[outcome] / sum(self.counts.values())

    def largest_deficit(self) -> float:
        """Points by which the worst of our files agrees less often with the float network than TensorFlow's file."""
        return max(
            network["ways"][any_model_page.TENSORFLOW]["agreement_percent"] - way["agreement_percent"]
            for network in self.networks.values()
            for way in network["ways"].values()
            if "agreement_percent" in way
        )


class Reliability:
    """reliability.json."""

    def __init__(self, record: Mapping) -> None:
        self.counts = reliability_page.count_outcomes(record)
        self.faults = reliability_page.list_faults(record)
        self.missing = [
            reliability_page.name_part(name) for name in reliability_page.PARTS if name not in record["parts"]
        ]
        self.incomplete = [
            reliability_page.name_part(name) for name, part in record["parts"].items() if not part["is_complete"]
        ]
        self.machine = name_machines(part["machine"] for part in record["parts"].values())


class CodebookLimit:
    """codebook_limit.json."""

    def __init__(self, record: Mapping) -> None:
        self._trainings = record["trainings"]
        self.chosen, self.epochs = record["chosen"], record["epochs"]
        self.machine = name_machines([record["machine"]])

    def mean(self, k: str) -> float:
        """Mean top-1 over the numbers of clusters and the seeds."""
        return average(self._trainings, k, *CLUSTERS)

    def ranking(self, clusters: int) -> list[str]:
        """The limits from the worst to the best with a number of clusters."""
        limits = dict.fromkeys(training["oabn_k"] for training in self._trainings)
        return sorted(limits, key=lambda k: average(self._trainings, k, str(clusters)))

    def deviation(self, k: str) -> float:
        """Standard deviation over the seeds of the mean over the numbers of clusters."""
        means = [statistics.mean(run[count] for count in CLUSTERS) for run in self._trainings if run["oabn_k"] == k]
        return statistics.stdev(means)


class Recipes:
    """recipes.json."""

    def __init__(self, record: Mapping) -> None:
        self.gains = {row["recipe"]: row["gain_points"] for row in record["rows"]}
        self.teacher, self.chance = recipes.find_teacher(record), recipes.estimate_chance(record)
        self.epochs, self.baseline = record["epochs"], record["rows"][0]["top1_percent"]
        self.machine = name_machines(row["machine"] for row in record["rows"])


class TrainStep:
    """train_step.json."""

    def __init__(self, record: Mapping) -> None:
        self.cases, self.rounds = record["cases"], record["rounds"]
        self.machine = name_machines([record["machine"]])

    def times(self, model: str) -> list[float]:
        """Time of a step over that of BN, one per case."""
        return [rows[model]["step_time_over_bn"] for rows in self.cases.values()]


class Inference:
    """inference.json."""

    def __init__(self, record: Mapping) -> None:
        self.files, self.threads = record["files"], record["threads"]
        self.machine = name_machines([record["machine"]])
        self._ratios, self._tool = record["ratios"], record["beside_litert_benchmark"]

    def ratio(self, key: str) -> float:
        """Median of one ratio of times."""
        return self._ratios[key]["median"]

    def percent_over_tool(self, file: str) -> float:
        """How much longer our timing takes than that of litert-benchmark."""
        return 100 * (self._tool[file]["ours_over_litert_benchmark"] - 1)


class ClusterStep:
    """cluster_step.json."""

    def __init__(self, record: Mapping) -> None:
        self.cases = record
        self.machine = name_machines(case["machine"] for case in record.values())

    def times(self, case: str, method: str) -> list[float]:
        """Times of a step over plain fine-tuning, for all numbers of clusters and granularities of a method."""
        names = _list_variants(method)
        tables = self.cases[case]["times"].values()
        return [row["step_time"] for rows in tables for name, row in rows.items() if name in names]

    def memory(self, case: str, method: str) -> list[float]:
        """Peak memory over plain fine-tuning, for all granularities of a method."""
        names = _list_variants(method)
        return [ratio for name, (_, ratio) in self.cases[case]["peak_memory_mib_and_ratio"].items() if name in names]


def _list_variants(method):
    """Names of a method, and of the method at each granularity."""
    return (method, *(f"{method}, {granularity}" for granularity in GRANULARITIES.values()))


def estimate_standard_error(top1_percent: float, images: int) -> float:
    """Standard error of an accuracy in points."""
    share = top1_percent / 100
    return 100 * float(np.sqrt(share * (1 - share) / images))
