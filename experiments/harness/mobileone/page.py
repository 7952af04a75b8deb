"""The page of experiments/mobileone.py: methods by weight width and granularity, on both sets of photographs."""

import statistics
from collections.abc import Mapping, Sequence

from harness.mobileone.rows import FLOAT, SETS
from harness.ptq.cells import AI_EDGE
from harness.tables import make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES


def render(record: Mapping) -> str:
    """The page in Markdown, from the content of mobileone.json, complete or not."""
    kind = "training photographs, for choices" if record["is_validation"] else "ImageNet's validation photographs"
    command = f"python experiments/mobileone.py{' --validation' if record['is_validation'] else ''}"
    introduction = make_paragraph(
        f"""`{command} --data_dir=...`: MobileOne-S0, trained on ImageNet by others, quantized with
        {record["calibration_images"]} photographs of ten classes (five for choices) and scored on {kind}. Each
        cell is 1000-way top-1 in percent on other photographs of those classes / on photographs of classes that
        calibration does not show. Int8 activations unless a row says otherwise. Methods that learn take
        {record["iterations"]} steps for each layer. Every file runs in LiteRT. ai-edge-quantizer's INT4 weights are
        stored as int8, codes and scales unchanged, and its depthwise convolutions have 8 bits in all rows. Seconds lead
        from the float network to a checked file, and peak memory is that of the whole process with all photographs;
        both are medians over a row."""
    )
    rows = record["rows"]
    sections = ["# MobileOne-S0 on ImageNet photographs", introduction, make_methods_table(rows)]
    return "\n\n".join(sections)


def make_methods_table(rows: Sequence[Mapping]) -> str:
    """One line per method; a column for each weight width and granularity."""
    places = sorted(
        {(row["bits"], row["granularity"]) for row in rows if row["method"] != FLOAT},
        key=lambda place: (-place[0], list(GRANULARITIES).index(place[1])),
    )
    lines = []
    for row in rows:
        if row["method"] == FLOAT:
            lines.append([f"float {_format_top1(row)}"] + [""] * (len(places) + 2))
    for title in dict.fromkeys(_make_title(row) for row in rows if row["method"] != FLOAT):
        group = [row for row in rows if _make_title(row) == title]
        cells = {(row["bits"], row["granularity"]): _format_top1(row) for row in group}
        seconds, memory = (statistics.median(row[name] for row in group) for name in ("seconds", "peak_memory_mib"))
        lines.append([title, *(cells.get(place, "") for place in places), f"{seconds:.0f} s", f"{memory / 1024:.1f}"])
    columns = [f"{bits} bit {GRANULARITIES[granularity]}" for bits, granularity in places]
    return make_table(lines, ["method", *columns, "time", "GiB"])


def _make_title(row):
    title = row["method"].replace(AI_EDGE, "ai-edge-quantizer, ")
    return title if row["activation_bits"] == 8 else f"{title}, {row['activation_bits']}-bit activations"


def _format_top1(row):
    return " / ".join(f"{row[f'{name}_top1_percent']:.1f}" for name in SETS)
