"""The plots of a report as inline SVG, by Matplotlib: text stays text, and takes the page's colour, light or dark."""

import functools
import io
import itertools
import re

import markupsafe
import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from tf_repvgg.report.gather import pareto

# Drawn in this colour, which the page's own takes the place of.
_INK = "#010203"
_COLOURS = ("#3b82c4", "#d9544d", "#3f9b62", "#c9892b", "#8d68c4", "#2ba3a3")
_BRANCH_COLOURS = {"conv3x3": _COLOURS[0], "conv1x1": _COLOURS[2], "identity": _COLOURS[1]}
_MARKERS = "osD^vP"
# In inches; narrow enough that letters can be read when a phone shows the figure in full.
_WIDTH = 4.6
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tf_repvgg",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=_COLOURS),
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def _drawn(draw):
    """Turns a function that draws on axes and returns what they show, in words, into one that returns SVG."""

    @functools.wraps(draw)
    def drawn(*arguments, height=3.1):
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            words = draw(figure.subplots(), *arguments)
            return _inline(figure, words)

    return drawn


_numbers = itertools.count()


def _inline(figure, words):
    content, prefix = io.StringIO(), f"figure{next(_numbers)}-"
    figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names are those of one file; here they share a page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = markupsafe.escape(words)
    return svg.replace(_INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _legend(axis, columns=2):
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


@_drawn
def accuracy_by_bits(axis, runs):
    """Top-1 over weight bits: a line for each run, granularity and method; float as a dashed line."""
    series = {}
    for run in runs:
        for file in run.files:
            series.setdefault((run.title, file.series or "integer"), []).append(file)
    colours = {run.title: colour for run, colour in zip(runs, itertools.cycle(_COLOURS))}
    for number, ((title, name), files) in enumerate(series.items()):
        files = sorted(files, key=lambda file: file.bits)
        axis.plot(
            [file.bits for file in files],
            [file.top1 for file in files],
            color=colours[title],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="--" if "per channel" in name else "-",
            markersize=5,
            label=name,
        )
    for run in runs:
        axis.axhline(run.reference_top1, color=colours[run.title], linestyle=":", linewidth=1)
    bits = sorted({file.bits for run in runs for file in run.files})
    axis.set_xlim(bits[-1] + 0.4, bits[0] - 0.4)
    axis.set_xticks(bits)
    axis.set(xlabel="bits per weight", ylabel="top-1, percent")
    _legend(axis)
    return "Top-1 over bits per weight. " + "; ".join(
        f"{name}: " + ", ".join(f"{file.bits} bits {file.top1:.1f} %" for file in files)
        for (_, name), files in series.items()
    )


@_drawn
def training(axis, runs):
    """Top-1 of each epoch, on validation data where some were held out."""
    for run in runs:
        epochs = [entry["epoch"] for entry in run.epochs]
        for key, words, style in (
            ("top1_percent", "training", "-"),
            ("val_top1_percent", "validation", "--"),
        ):
            if run.epochs and key in run.epochs[-1]:
                values = [entry.get(key) for entry in run.epochs]
                axis.plot(epochs, values, style, label=f"{run.title} {words}".strip(), linewidth=1.4)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="top-1, percent")
    _legend(axis)
    return "Top-1 in each epoch of training"


@_drawn
def weights(axis, histogram, title):
    """Weights of one layer: the merged kernel filled, each branch as a line, centroids as uprights."""
    axis.stairs(histogram.merged, histogram.edges, fill=True, color=_INK, alpha=0.25, label="merged")
    for name, counts in histogram.branches.items():
        axis.stairs(counts, histogram.edges, color=_BRANCH_COLOURS.get(name), linewidth=1.1, label=name)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.5)
    for number, centroid in enumerate(histogram.codebook or ()):
        axis.axvline(centroid, color=_COLOURS[3], linewidth=0.9, alpha=0.8, label=None if number else "centroids")
    axis.set_title(title)
    axis.set(xlabel="weight / standard deviation of the merged kernel", ylabel="weights")
    _legend(axis, 5)
    return f"Histogram of weights, {title}: the largest merged weight is {histogram.largest:.1f} standard deviations"


@_drawn
def outliers(axis, runs):
    """Largest merged weight over standard deviation, layer by layer."""
    names = list(dict.fromkeys(entry["name"] for run in runs for entry in run.exports[0]["outliers"]))
    for number, run in enumerate(runs):
        ratios = {entry["name"]: entry["outlier_ratio"] for entry in run.exports[0]["outliers"]}
        here = [name for name in names if name in ratios]
        axis.plot(
            [ratios[name] for name in here],
            [names.index(name) for name in here],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=0.8,
            markersize=5,
            label=run.title or "merged kernel",
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("largest merged weight / standard deviation of the layer")
    _legend(axis, 3)
    return "Outlier ratio of each layer. " + "; ".join(
        f"{run.title or 'merged kernel'}: up to {max(e['outlier_ratio'] for e in run.exports[0]['outliers']):.1f}"
        for run in runs
    )


@_drawn
def size_and_accuracy(axis, runs):
    """Top-1 over bytes, the Pareto front marked; hollow where the bytes are computed and no such file is written."""
    points = [point for run in runs for point in _sizes(run)]
    colours = {run.title: colour for run, colour in zip(runs, itertools.cycle(_COLOURS))}
    for title, colour in colours.items():
        for is_written in (True, False):
            chosen = [p for p in points if p[3] == title and p[4] == is_written]
            if chosen:
                axis.scatter(
                    [p[0] for p in chosen],
                    [p[1] for p in chosen],
                    s=26,
                    facecolor=colour if is_written else "none",
                    edgecolor=colour,
                    label=f"{title} {'written' if is_written else 'if packed'}".strip(),
                )
    front = [points[index] for index in pareto([(p[0], p[1]) for p in points])]
    axis.plot([p[0] for p in front], [p[1] for p in front], color=_INK, linewidth=0.8, alpha=0.6, label="Pareto front")
    axis.scatter([p[0] for p in front], [p[1] for p in front], s=80, facecolor="none", edgecolor=_INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axis.xaxis.set_minor_formatter(EngFormatter(unit="B"))
    axis.tick_params(axis="x", which="both", labelrotation=30)
    axis.set(xlabel="bytes of the file", ylabel="top-1, percent")
    _legend(axis)
    return "Top-1 over bytes. On the Pareto front: " + "; ".join(
        f"{' '.join(filter(None, [p[3], p[2]]))} {p[0]:,} bytes {p[1]:.1f} %" for p in front
    )


def _sizes(run):
    """(bytes, top-1, label, run, whether there is such a file) of what is written, and of what could be packed."""
    for file in run.files:
        yield file.record["file_bytes"], file.top1, file.label, run.title, True
        for target, facts in file.record["targets"].items():
            if "top1_percent" in facts:
                yield facts["file_bytes"], facts["top1_percent"], f"{file.label}, {target}", run.title, True
        if file.packed_bytes < file.record["file_bytes"]:
            yield file.packed_bytes, file.top1, file.label, run.title, False


@_drawn
def latency(axis, bars, title):
    """Median latencies as bars, to the 90th percentile as whiskers; bars are (label, p50, p90) in milliseconds."""
    labels, middle, high = zip(*bars, strict=True)
    places = np.arange(len(bars))
    whiskers = [np.zeros(len(bars)), np.subtract(high, middle)]
    style = {"ecolor": _INK, "elinewidth": 0.8, "capsize": 2}
    axis.barh(places, middle, height=0.4, color=_COLOURS[0], xerr=whiskers, error_kw=style)
    for place, label in zip(places, labels, strict=True):  # above the bar: beside it, long ones would leave no room
        axis.text(0, place - 0.26, label, fontsize=8, va="bottom")
    axis.set_yticks([])
    axis.set_ylim(len(bars) - 0.6, -0.8)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("milliseconds for one image")
    axis.set_title(title)
    return f"{title}: " + "; ".join(f"{label} {p50:.3g} ms" for label, p50, _ in bars)


@_drawn
def confusion(axis, counts, labels, title):
    """Images by true class and class found; the diagonal, which is right, left grey."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(np.where(np.eye(len(counts), dtype=bool), np.nan, shares), cmap=_wrong(), norm=PowerNorm(0.5, 0, 1))
    for row, column in zip(*np.nonzero(counts), strict=True):
        is_right = row == column
        axis.text(
            column,
            row,
            counts[row, column],
            ha="center",
            va="center",
            fontsize=8 if counts.max() < 1000 else 6.5,
            alpha=0.75 if is_right else 1,
        )
    axis.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 3 else 90)
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(visible=False)
    axis.set(xlabel="found", ylabel="true class")
    axis.set_title(title)
    right = np.trace(counts)
    return f"Confusion matrix, {title}: {right} of {counts.sum()} images right"


def _wrong():
    """From transparent to the colour of mistakes."""
    return LinearSegmentedColormap.from_list("wrong", [(*to_rgb(_COLOURS[1]), 0), _COLOURS[1]])
