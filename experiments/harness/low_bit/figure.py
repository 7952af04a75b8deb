"""The figure of experiments/low_bit.py: the accuracy that fewer weight clusters cost, by method and by model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from tf_repvgg import storage
from tf_repvgg.quantization.uniform import GRANULARITIES

_COLOURS = {"ClusterQAT": "#d1495b", "LSQ": "#4878a8", "tfmot": "#3f9b62"}
_LINES = {"per_tensor": "-", "per_channel": "--"}
_CLUSTERS = (16, 8, 6, 5, 4, 3)
_TICKS = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


def find_points(rows: Iterable[Mapping], method: str, granularity: str, model: str) -> tuple[list[int], list[float]]:
    """Numbers of clusters in rising order, and the drops in points, of the rows that did not diverge."""
    drops = {
        row["states"]: row["drop"]
        for row in rows
        if (row["method"], row["granularity"], row["models"][0]) == (method, granularity, model)
        and min(row["integer_top1_percent"]) > 0
    }
    return sorted(drops), [drops[clusters] for clusters in sorted(drops)]


def draw(record: Mapping, path: Path) -> None:
    """Writes a PNG: left, methods on the OABN models; right, ClusterQAT per tensor on every model.

    Args:
      record: Content of low_bit.json.
      path: File to write.
    """
    rows = record["headline"] + record["peers"] + record["others"]
    figure, (methods, models) = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
    for method, colour in _COLOURS.items():
        for granularity, line in _LINES.items():
            label = f"{method}, {GRANULARITIES[granularity]}"
            points = find_points(rows, method, granularity, "OABN")
            methods.plot(*points, line, marker="o", color=colour, label=label)
    methods.set_title("by method, OABN models", fontsize=10)
    for model in dict.fromkeys(row["models"][0] for row in rows):
        models.plot(*find_points(rows, "ClusterQAT", "per_tensor", model), marker="o", label=model)
    models.set_title("ClusterQAT per tensor, by model", fontsize=10)
    for axis in (methods, models):
        axis.set_xscale("log", base=2)
        axis.set_xticks(_CLUSTERS, [str(count) for count in _CLUSTERS])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.invert_xaxis()
        axis.set_xlabel("clusters of every layer's weights")
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, loc="lower left", handlelength=3)
    # Linear around zero, where most drops are, and logarithmic where methods fail.
    methods.set_yscale("symlog", linthresh=1)
    methods.set_yticks(_TICKS, [str(tick) for tick in _TICKS])
    methods.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    lowest, highest = methods.dataLim.y0, max(axis.dataLim.y1 for axis in (methods, models))
    methods.set_ylim(1.5 * max(highest, 1), min(lowest, models.dataLim.y0, 0) - 0.25)
    methods.set_ylabel("drop in top-1 against float, points")
    with storage.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
