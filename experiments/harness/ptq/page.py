"""The readable page of experiments/ptq.py: a table per model, ours beside ai-edge-quantizer, and the targets."""

import statistics

from tabulate import tabulate

from harness.ptq.ai_edge import ALGORITHMS
from harness.ptq.cells import AI_EDGE
from tf_repvgg.quantization.uniform import GRANULARITIES

# Pairs of like methods: which of ours stands against which of theirs.
LIKE = (("min_max", "min_max"), ("mse", "mse"), ("octav", "octav"))
# (bits, granularity): points below float that the best method may lose on OABN.
LIMITS = {(4, "per_channel"): 1.0, (4, "per_tensor"): 4.0, (3, "per_channel"): 6.0}
INT8_LIMIT = 0.2
LARGEST_DEFICIT = 0.3


def page(record) -> str:
    """Everything that has been measured so far, as Markdown."""
    models = {model: its for model, its in record["models"].items() if its["cells"]}
    settings = record["settings"]
    images = "the whole test split" if settings["test_images"] is None else f"{settings['test_images']:,} test images"
    sections = [
        f"""# Post-training quantization

`python experiments/ptq.py`: one seed, {images}, every file run in LiteRT, {settings["calibration_images"]:,} training
images for calibration, {settings["iterations"]} steps per layer of methods that learn. Top-1 in percent, per tensor /
per channel; int8 activations. Seconds are those of one file's quantization on one core, in the median, while
{record["workers"]} processes measured. Images: JPEG re-encodings (quality 75) of CIFAR-10 where --data_dir points at
the project's shared copy. ai-edge-quantizer's INT4 weights are stored as int8, codes and scales unchanged, so that
both toolkits run on the same kernels.""",
        _best(models),
        *(_model(model, its) for model, its in models.items()),
        _comparison(models),
        _targets(models),
        _states(models),
    ]
    return "\n\n".join(filter(None, sections))


def comparable(models) -> list[dict]:
    """Cells that both toolkits have: {"kind", "model", "weight_bits", "granularity", "ours", "theirs"}, in percent.

    Like against like by `LIKE`, and under "best" the best method of ours against the best of theirs.
    """
    found = []
    for model, its in models.items():
        top1 = _top1(its)
        places = {(bits, kind) for method, bits, kind in top1 if method.startswith(AI_EDGE)}
        for bits, kind in sorted(places):
            pairs = {
                f"{mine} / {like}": (top1.get((mine, bits, kind)), top1.get((AI_EDGE + like, bits, kind)))
                for mine, like in LIKE
            }
            values = {True: [], False: []}
            for (method, *place), value in top1.items():
                if place == [bits, kind]:
                    values[method.startswith(AI_EDGE)].append(value)
            pairs["best"] = max(values[False], default=None), max(values[True], default=None)
            place = {"model": model, "weight_bits": bits, "granularity": kind}
            found += [
                {"kind": name, **place, "ours": ours, "theirs": theirs}
                for name, (ours, theirs) in pairs.items()
                if ours is not None and theirs is not None
            ]
    return found


def _top1(its):
    return {(cell["method"], cell["weight_bits"], cell["granularity"]): cell["top1_percent"] for cell in its["cells"]}


def _best(models):
    """What the best of our methods reaches, and which one it is."""
    widths = sorted({bits for its in models.values() for _, bits, _ in _top1(its)}, reverse=True)
    rows = []
    for model, its in models.items():
        best = {}
        for (method, *place), value in _top1(its).items():
            if not method.startswith(AI_EDGE):
                best[tuple(place)] = max(best.get(tuple(place), (0, "")), (value, method))
        named = {place: f"{value:.1f} {method}" for place, (value, method) in best.items()}
        cells = [" / ".join(named.get((bits, kind), "") for kind in GRANULARITIES) for bits in widths]
        rows.append([model, f"{its['float_top1_percent']:.1f}", *cells])
    headers = ["model", "FP32", *(f"{bits} bit" for bits in widths)]
    return "## The best of our methods\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _model(model, its):
    top1 = _top1(its)
    widths = sorted({bits for _, bits, _ in top1}, reverse=True)
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in sorted(its["cells"], key=_order)):
        cells = [_pair([top1.get((method, bits, kind)) for kind in GRANULARITIES]) for bits in widths]
        seconds = [cell["quantization_seconds"] for cell in its["cells"] if cell["method"] == method]
        rows.append([method, *cells, f"{statistics.median(seconds):.0f} s"])
    headers = ["method", *(f"{bits} bit" for bits in widths), "time"]
    notes = sorted({f"{cell['method']}: {note}" for cell in its["cells"] for note in cell["notes"]})
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    heading = f"## {model}: FP32 {its['float_top1_percent']:.1f} %"
    return "\n\n".join([heading, table, *(["\n".join(f"- {note}" for note in notes)] if notes else [])])


def _order(cell):
    return cell["method"].startswith(AI_EDGE), "+" in cell["method"]


def _pair(values):
    return " / ".join("" if value is None else f"{value:.1f}" for value in values) if any(values) else ""


def _comparison(models):
    cells = comparable(models)
    if not cells:
        return None
    rows = []
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        of_kind = [cell for cell in cells if cell["kind"] == kind]
        worst = min(of_kind, key=_lead)
        means = [statistics.mean(cell[whose] for cell in of_kind) for whose in ("ours", "theirs")]
        place = f"{worst['model']}, {worst['weight_bits']} bit {GRANULARITIES[worst['granularity']]}"
        rows.append([kind, len(of_kind), *(f"{mean:.2f}" for mean in means), f"{_lead(worst):+.2f} ({place})"])
    like = [cell for cell in cells if cell["kind"] != "best"]
    behind = [cell for cell in like if _lead(cell) < -LARGEST_DEFICIT]
    names = ["ours / theirs", "cells", "ours, mean", "theirs, mean", "least lead, in points"]
    listed = "".join(
        f"\n- {cell['kind']}, {cell['model']}, {cell['weight_bits']} bit {GRANULARITIES[cell['granularity']]}: "
        f"{cell['ours']:.2f} against {cell['theirs']:.2f}"
        for cell in behind
    )
    return (
        f"## Beside ai-edge-quantizer\n\nIts algorithms: {', '.join(ALGORITHMS)}; static, int8 activations.\n\n"
        f"{tabulate(rows, names, tablefmt='github', disable_numparse=True)}\n\n"
        f"Cells of like methods in which ours is behind by more than {LARGEST_DEFICIT} points: "
        f"{len(behind)} of {len(like)}.{listed}"
    )


def _lead(cell):
    return cell["ours"] - cell["theirs"]


def _targets(models):
    """What the OABN model loses, against what it may."""
    rows, below = [], "points below FP32"
    for model, its in models.items():
        if "oabn" not in model:
            continue
        ours = {key: value for key, value in _top1(its).items() if not key[0].startswith(AI_EDGE)}
        places = {}
        for (method, *place), value in ours.items():
            places.setdefault(tuple(place), []).append((its["float_top1_percent"] - value, method))
        if int8 := places.get((8, "per_tensor")):
            loss, method = max(int8)
            rows.append([f"{model}, 8 bit per tensor, worst method: {below}", method, f"{loss:.2f}", INT8_LIMIT])
        for (bits, kind), limit in LIMITS.items():
            if found := places.get((bits, kind)):
                loss, method = min(found)
                place = f"{model}, {bits} bit {GRANULARITIES[kind]}"
                rows.append([f"{place}, best method: {below}", method, f"{loss:.2f}", limit])
    seconds = [cell["quantization_seconds"] for its in models.values() for cell in its["cells"] if _is_adaquant(cell)]
    if seconds:
        rows.append(["slowest file of AdaQuant: seconds on one core", "adaquant", f"{max(seconds):.0f}", 180])
    if not rows:
        return None
    headers = ["what", "method", "measured", "at most"]
    return "## Targets\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _states(models):
    """A warning, where the program was changed between cells."""
    states = {cell.get("sources_sha256") for its in models.values() for cell in its["cells"]}
    return f"Cells were measured by {len(states)} states of this package." if len(states) > 1 else None


def _is_adaquant(cell):
    return cell["method"] == "adaquant"
