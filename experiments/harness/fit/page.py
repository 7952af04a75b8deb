"""The page of experiments/fit.py."""

from harness.fit.cells import WAYS
from harness.low_bit.fine_tunings import Result
from harness.low_bit.paired_statistics import estimate_drop
from harness.tables import IMAGES, make_paragraph, make_table

_COSTS = {"file_bytes": "bytes of the file", "time_ms": "time that Vela estimates"}


def render(record: dict) -> str:
    """The page in Markdown, from the content of fit.json."""
    settings, machine = record["settings"], record["machine"]
    images = record["cells"][0]["images"] if record["cells"] else 0
    introduction = make_paragraph(
        f"""`python experiments/fit.py`: top-1 in percent on {images:,} test images, in LiteRT with int8 activations.
        Each row has the budget of a uniform choice, codebooks of so many clusters per tensor in every layer: the size
        of its file. "8 bits at the ends": 256 clusters in the first and the last layer, and the uniform number
        elsewhere, which takes a little more than the budget. "Greedy": from 256 clusters downwards, always the step
        that saves most bytes for its damage. "Exact choice": by integer programming alone. "Fitted": with the local
        search, as export/main.py --fit does. In brackets: points above the uniform choice, with the paired 95 %
        interval over the test images. Damages and choices use {settings["calibration_images"]:,} training images
        without labels, seed 0. {IMAGES} Machine: {machine["cpu"]}, {machine["cores"]} cores."""
    )
    sections = ["# The best network that fits", introduction]
    sections += [make_tables(record, target) for target in dict.fromkeys(cell["target"] for cell in record["cells"])]
    sections += ["## Sums of damages beside measured errors", _make_correlations(record)]
    return "\n\n".join(sections)


def make_tables(record: dict, target: str) -> str:
    """The tables of a target, one for each model, method and kind of cost.

    Args:
      record: Content of fit.json.
      target: Name of the target.
    """
    groups: dict[tuple, list] = {}
    for cell in record["cells"]:
        if cell["target"] == target:
            groups.setdefault((cell["model"], cell["method"], cell["field"]), []).append(cell)
    return "\n\n".join(
        f"{model}, `{target}`, `{method}`, budget in {_COSTS[field]}:\n\n{_make_table(cells, field)}"
        for (model, method, field), cells in groups.items()
    )


def _make_table(cells, field):
    by_key = {(cell["clusters"], cell["way"]): cell for cell in cells}
    ways = [way for way in WAYS if any(way == cell["way"] for cell in cells)]
    numbers = sorted({cell["clusters"] for cell in cells}, reverse=True)
    rows = []
    for number in numbers:
        uniform = by_key.get((number, "uniform"))
        if uniform is None:
            continue
        cost = uniform["measured"][field]
        row = [str(number), f"{cost:,}" if field == "file_bytes" else f"{cost:.3f} ms"]
        rows.append(row + [_make_cell(uniform, by_key.get((number, way))) for way in ways])
    return make_table(rows, ["clusters", "budget", *(WAYS[way] for way in ways)])


def _make_cell(uniform, cell):
    if cell is None:
        return "-"
    top1 = f"{cell['top1_percent']:.2f}"
    if cell["way"] == "uniform":
        return top1
    drop, half = estimate_drop([Result.from_record(uniform)], [Result.from_record(cell)])
    return f"{top1} ({-drop:+.2f} ± {half:.2f})"


def _make_correlations(record):
    rows = [
        [
            model,
            str(content["assignments"]),
            f"{content['rank_correlation']:.3f}",
            f"{content['seconds_for_damages']:.0f}",
            f"{content['peak_memory_gib']:.1f}",
        ]
        for model, content in record["correlations"].items()
    ]
    headers = ["model", "random assignments", "rank correlation", "seconds for all damages", "peak memory, GiB"]
    table = make_table(rows, headers)
    gains = [
        (cell["search"]["error_of_exact_choice"], cell["search"]["error"])
        for cell in record["cells"]
        if cell["way"] == "fitted" and cell["target"] == "tflm_lut"
    ]
    if not gains:
        return table
    shares = sorted(100 * (1 - after / before) for before, after in gains)
    text = f"""The local search lowers the error of the exact choice by {shares[0]:.1f} to {shares[-1]:.1f} %, in the
        median {shares[len(shares) // 2]:.1f} %, over {len(shares)} searches."""
    return f"{table}\n\n{make_paragraph(text)}"
