"""The headline table: what each method keeps of each model's accuracy."""

from collections.abc import Iterable, Mapping

import numpy as np

from harness.low_bit.models import OABN_MODELS, OTHER_MODELS
from harness.ptq.page import find_best
from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

MODELS = ("BN", "OABN", "QARepVGG")
_CONFIGS = OABN_MODELS | OTHER_MODELS
# {weight bits: number of clusters of as many bits}; the first width has been measured without training only.
_CLUSTERS = {8: 256, 4: 16, 3: 8, 2: 4}
_HEADERS = ("model", "method", "FP32", "int8", "4 bit, 16 clusters", "3 bit, 8 clusters", "2 bit, 4 clusters")


def render(results: Mapping[str, dict]) -> str:
    """The page of the table in Markdown.

    Args:
      results: Contents of the JSON files in results/ by name.
    """
    return f"# Headline results\n\n{make_headline_table(results)}\n\n{make_note(results)}"


def make_note(results: Mapping[str, dict]) -> str:
    """The paragraph under the table."""
    return make_paragraph(
        f"""Top-1 in percent on all {results["min_max"]["BN"]["export"]["images"]:,} test images of CIFAR-10, as integer
        files in LiteRT with int8 activations; weights per tensor / per channel; "-" and empty cells have not been
        measured. min-max and best PTQ quantize the trained network without further training; best PTQ is the best of
        {count_ptq_methods(results["ptq"])} methods in each cell, picked on the test images. ClusterQAT, LSQ and tfmot
        fine-tune for three epochs, and their FP32 is the same network fine-tuned in float; on OABN they are means over
        two models. LSQ has as many levels as the column has clusters. {IMAGES}"""
    )


def make_headline_table(results: Mapping[str, dict]) -> str:
    """One row per model and method, as far as measured."""
    rows = []
    for model in MODELS:
        rows.append([model, "min-max", *_quantize_min_max(results["min_max"][model]["export"])])
        rows.append([model, "best PTQ", *_quantize_best(results["ptq"]["models"][_CONFIGS[model]])])
        rows += [[model, *cells] for cells in _fine_tune(results["low_bit"], model)]
    return make_table(rows, _HEADERS)


def count_ptq_methods(record: Mapping) -> int:
    """Number of our methods that experiments/ptq.py has measured."""
    cells = (cell for model in record["models"].values() for cell in model["cells"])
    return len({cell["method"] for cell in cells if not cell["method"].startswith("ai-edge-quantizer")})


def _quantize_min_max(export):
    top1 = {(file["weight_bits"], file["granularity"]): file["top1_percent"] for file in export["files"]}
    return [_format([export["float_fused_top1_percent"]]), *_join_widths(top1)]


def _quantize_best(model):
    top1 = {place: value for place, (value, _) in find_best(model).items()}
    return [_format([model["float_top1_percent"]]), *_join_widths(top1)]


def _fine_tune(record, model):
    """Yields the method, FP32 and one cell per width."""
    rows = [row for part in ("headline", "peers", "others") for row in record[part] if row["models"][0] == model]
    for method in dict.fromkeys(row["method"] for row in rows):
        method_rows = [row for row in rows if row["method"] == method]
        bits = {count: width for width, count in _CLUSTERS.items()}
        top1 = {
            (bits[row["states"]], row["granularity"]): float(np.mean(row["integer_top1_percent"]))
            for row in method_rows
            if row["states"] in bits
        }
        yield [method, _format([np.mean(method_rows[0]["reference_top1_percent"])]), *_join_widths(top1)]


def _join_widths(top1):
    """One cell per width: "per tensor / per channel", or empty."""
    return [_format([top1.get((bits, kind)) for kind in GRANULARITIES]) for bits in _CLUSTERS]


def _format(values: Iterable[float | None]):
    values = list(values)
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.1f}" for value in values)
