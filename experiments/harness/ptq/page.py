"""The page of experiments/ptq.py: a table per model, our methods beside ai-edge-quantizer, and the targets."""

import statistics
from collections.abc import Iterable, Mapping

from harness.ptq.ai_edge import ALGORITHMS
from harness.ptq.cells import AI_EDGE
from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

# Pairs of like methods: ours, and the algorithm of ai-edge-quantizer that it is compared with.
LIKE = (("min_max", "min_max"), ("mse", "mse"), ("octav", "octav"))
# {(bits, granularity): points below float that the best method may lose on OABN}
LIMITS = {(4, "per_channel"): 1.0, (4, "per_tensor"): 4.0, (3, "per_channel"): 6.0}
INT8_LIMIT = 0.2
ADAQUANT_SECONDS_LIMIT = 180
LARGEST_DEFICIT = 0.3


def render(record: Mapping) -> str:
    """The page in Markdown, from the content of ptq.json, complete or not."""
    models = {name: model for name, model in record["models"].items() if model["cells"]}
    settings = record["settings"]
    images = "the whole test split" if settings["test_images"] is None else f"{settings['test_images']:,} test images"
    introduction = make_paragraph(
        f"""`python experiments/ptq.py`: one seed, {images}, every file run in LiteRT,
        {settings["calibration_images"]:,} training images for calibration, {settings["iterations"]} steps per layer
        of methods that learn. Top-1 in percent, per tensor / per channel; int8 activations. Seconds are the median
        time of quantizing one file on one core, while {record["workers"]} processes measured. ai-edge-quantizer's
        INT4 weights are stored as int8, codes and scales unchanged, so that both toolkits run on the same kernels.
        {IMAGES}"""
    )
    sections = [
        "# Post-training quantization",
        introduction,
        "## The best of our methods",
        make_best_table(models),
        *(_describe_model(name, model) for name, model in models.items()),
        _describe_comparison(models),
        _describe_targets(models),
        _describe_sources(models),
    ]
    return "\n\n".join(filter(None, sections))


def compare(models: Mapping[str, Mapping]) -> list[dict]:
    """Cells that both toolkits have: {"kind", "model", "weight_bits", "granularity", "ours", "theirs"}, in percent.

    The kinds are the pairs of `LIKE`, and "best": the best of our methods against the best of theirs.
    """
    compared = []
    for name, model in models.items():
        cells = _index_top1(model)
        places = {(bits, granularity) for method, bits, granularity in cells if method.startswith(AI_EDGE)}
        for bits, granularity in sorted(places):
            methods = {method: top1 for (method, *rest), top1 in cells.items() if rest == [bits, granularity]}
            pairs = {
                f"{method} / {algorithm}": (methods.get(method), methods.get(AI_EDGE + algorithm))
                for method, algorithm in LIKE
            }
            by_toolkit = [
                [top1 for method, top1 in methods.items() if method.startswith(AI_EDGE) is is_peer]
                for is_peer in (False, True)
            ]
            pairs["best"] = tuple(max(values, default=None) for values in by_toolkit)
            place = {"model": name, "weight_bits": bits, "granularity": granularity}
            compared += [
                {"kind": kind, **place, "ours": top1, "theirs": peer_top1}
                for kind, (top1, peer_top1) in pairs.items()
                if top1 is not None and peer_top1 is not None
            ]
    return compared


def find_best(model: Mapping) -> dict[tuple[int, str], tuple[float, str]]:
    """{(bits, granularity): (top-1, method)} of the best of our methods on one model."""
    best = {}
    for (method, *place), top1 in _index_top1(model).items():
        if not method.startswith(AI_EDGE):
            best[tuple(place)] = max(best.get(tuple(place), (0, "")), (top1, method))
    return best


def make_best_table(models: Mapping[str, Mapping]) -> str:
    """One row per model: the best accuracy of our methods, and the method that reaches it."""
    widths = _list_widths(bits for model in models.values() for _, bits, _ in _index_top1(model))
    rows = []
    for name, model in models.items():
        cells = {place: f"{top1:.1f} {method}" for place, (top1, method) in find_best(model).items()}
        pairs = [" / ".join(cells.get((bits, kind), "") for kind in GRANULARITIES) for bits in widths]
        rows.append([name, f"{model['float_top1_percent']:.1f}", *pairs])
    return make_table(rows, ["model", "FP32", *(f"{bits} bit" for bits in widths)])


def make_methods_table(model: Mapping) -> str:
    """One row per method on one model."""
    top1 = _index_top1(model)
    widths = _list_widths(bits for _, bits, _ in top1)
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in sorted(model["cells"], key=_rank)):
        pairs = [_join_pair([top1.get((method, bits, kind)) for kind in GRANULARITIES]) for bits in widths]
        seconds = [cell["quantization_seconds"] for cell in model["cells"] if cell["method"] == method]
        rows.append([method, *pairs, f"{statistics.median(seconds):.0f} s"])
    return make_table(rows, ["method", *(f"{bits} bit" for bits in widths), "time"])


def make_toolkits_table(models: Mapping[str, Mapping]) -> str:
    """One row per kind of `compare`: means of both toolkits, and our least lead."""
    cells = compare(models)
    rows = []
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        like_cells = [cell for cell in cells if cell["kind"] == kind]
        worst = min(like_cells, key=find_lead)
        means = [statistics.mean(cell[toolkit] for cell in like_cells) for toolkit in ("ours", "theirs")]
        place = f"{worst['model']}, {worst['weight_bits']} bit {GRANULARITIES[worst['granularity']]}"
        rows.append([kind, len(like_cells), *(f"{mean:.2f}" for mean in means), f"{find_lead(worst):+.2f} ({place})"])
    return make_table(rows, ["ours / theirs", "cells", "ours, mean", "theirs, mean", "least lead, in points"])


def find_lead(cell: Mapping) -> float:
    """How many points our method is ahead, in a cell of `compare`."""
    return cell["ours"] - cell["theirs"]


def list_like_cells(models: Mapping[str, Mapping]) -> tuple[list[dict], list[dict]]:
    """Cells of like methods, and those of them in which ours is behind by more than `LARGEST_DEFICIT`."""
    like = [cell for cell in compare(models) if cell["kind"] != "best"]
    return like, [cell for cell in like if find_lead(cell) < -LARGEST_DEFICIT]


def _index_top1(model):
    return {(cell["method"], cell["weight_bits"], cell["granularity"]): cell["top1_percent"] for cell in model["cells"]}


def _list_widths(bits: Iterable[int]):
    return sorted(set(bits), reverse=True)


def _rank(cell):
    """Our methods first, combined ones last among them."""
    return cell["method"].startswith(AI_EDGE), "+" in cell["method"]


def _join_pair(values):
    return " / ".join("" if value is None else f"{value:.1f}" for value in values) if any(values) else ""


def _describe_model(name, model):
    notes = sorted({f"{cell['method']}: {note}" for cell in model["cells"] for note in cell["notes"]})
    parts = [f"## {name}: FP32 {model['float_top1_percent']:.1f} %", make_methods_table(model)]
    return "\n\n".join([*parts, *(["\n".join(f"- {note}" for note in notes)] if notes else [])])


def _describe_comparison(models):
    like, behind = list_like_cells(models)
    if not like:
        return None
    listed = "".join(
        f"\n- {cell['kind']}, {cell['model']}, {cell['weight_bits']} bit {GRANULARITIES[cell['granularity']]}: "
        f"{cell['ours']:.2f} against {cell['theirs']:.2f}"
        for cell in behind
    )
    return (
        f"## Beside ai-edge-quantizer\n\nIts algorithms: {', '.join(ALGORITHMS)}; static, int8 activations.\n\n"
        f"{make_toolkits_table(models)}\n\n"
        f"Cells of like methods in which ours is behind by more than {LARGEST_DEFICIT} points: "
        f"{len(behind)} of {len(like)}.{listed}"
    )


def _describe_targets(models):
    """The loss of the OABN model beside the largest loss that is acceptable."""
    rows = []
    for name, model in models.items():
        if "oabn" in name:
            rows += _list_losses(name, model)
    cells = (cell for model in models.values() for cell in model["cells"])
    if seconds := [cell["quantization_seconds"] for cell in cells if cell["method"] == "adaquant"]:
        row = ["slowest file of AdaQuant: seconds on one core", "adaquant", f"{max(seconds):.0f}"]
        rows.append([*row, ADAQUANT_SECONDS_LIMIT])
    if not rows:
        return None
    return "## Targets\n\n" + make_table(rows, ["quantity", "method", "measured", "at most"])


def _list_losses(name, model):
    losses = {}
    for (method, *place), top1 in _index_top1(model).items():
        if not method.startswith(AI_EDGE):
            losses.setdefault(tuple(place), []).append((model["float_top1_percent"] - top1, method))
    rows = []
    if int8 := losses.get((8, "per_tensor")):
        loss, method = max(int8)
        rows.append([f"{name}, 8 bit per tensor, worst method: points below FP32", method, f"{loss:.2f}", INT8_LIMIT])
    for (bits, kind), limit in LIMITS.items():
        if (bits, kind) in losses:
            loss, method = min(losses[bits, kind])
            place = f"{name}, {bits} bit {GRANULARITIES[kind]}"
            rows.append([f"{place}, best method: points below FP32", method, f"{loss:.2f}", limit])
    return rows


def _describe_sources(models):
    """A warning if the program changed between cells."""
    versions = {cell.get("sources_sha256") for model in models.values() for cell in model["cells"]}
    return f"The cells were measured by {len(versions)} versions of this package." if len(versions) > 1 else None
