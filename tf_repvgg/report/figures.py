"""The plots of a report. Each function returns SVG, and takes the height in inches as a keyword."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.ticker import EngFormatter, MaxNLocator

from tf_repvgg.report.records import File, Histogram, Run, find_pareto_front
from tf_repvgg.report.svg import COLOURS, INK, MARKERS, add_legend, return_svg

# All branches with a kernel of the block's size share the first colour.
_BRANCH_COLOURS = {"conv1x1": COLOURS[2], "conv_scale": COLOURS[2], "identity": COLOURS[1]}
_ERROR_COLOUR = COLOURS[1]


def _colours_by_run(runs):
    return {run.title: colour for run, colour in zip(runs, itertools.cycle(COLOURS))}


@return_svg
def draw_accuracy_by_bits(axes: Axes, runs: Sequence[Run]) -> str:
    """Top-1 by bits per weight: a line for each run, granularity and method; dotted for the float model."""
    series: dict[tuple[str, str], list[File]] = {}
    for run in runs:
        for file in run.files:
            series.setdefault((run.title, file.series or "integer"), []).append(file)
    colours = _colours_by_run(runs)
    for number, ((title, name), files) in enumerate(series.items()):
        files.sort(key=lambda file: file.bits)
        axes.plot(
            [file.bits for file in files],
            [file.top1 for file in files],
            color=colours[title],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="--" if "per channel" in name else "-",
            markersize=5,
            label=name,
        )
    for run in runs:
        axes.axhline(run.reference_top1, color=colours[run.title], linestyle=":", linewidth=1)
    bits = sorted({file.bits for run in runs for file in run.files})
    axes.set_xlim(bits[-1] + 0.4, bits[0] - 0.4)
    axes.set_xticks(bits)
    axes.set(xlabel="bits per weight", ylabel="top-1, percent")
    add_legend(axes)
    return "Top-1 by bits per weight. " + "; ".join(
        f"{name}: " + ", ".join(f"{file.bits} bits {file.top1:.1f} %" for file in files)
        for (_, name), files in series.items()
    )


@return_svg
def draw_training(axes: Axes, runs: Sequence[Run]) -> str:
    """Top-1 after each epoch, also on validation data if some were held out."""
    for run in runs:
        epochs = [entry["epoch"] for entry in run.epochs]
        for key, name, style in (("top1_percent", "training", "-"), ("val_top1_percent", "validation", "--")):
            if run.epochs and key in run.epochs[-1]:
                values = [entry.get(key, np.nan) for entry in run.epochs]
                axes.plot(epochs, values, style, label=f"{run.title} {name}".strip(), linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="top-1, percent")
    add_legend(axes)
    return "Top-1 by epoch of training"


@return_svg
def draw_weights(axes: Axes, histogram: Histogram, title: str) -> str:
    """Weights of one layer: the merged kernel filled, each branch as a line, centroids as vertical lines."""
    axes.stairs(histogram.merged, histogram.edges, fill=True, color=INK, alpha=0.25, label="merged")
    for name, counts in histogram.branches.items():
        axes.stairs(counts, histogram.edges, color=_BRANCH_COLOURS.get(name, COLOURS[0]), linewidth=1.1, label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    for number, centroid in enumerate(histogram.codebook or ()):
        axes.axvline(centroid, color=COLOURS[3], linewidth=0.9, alpha=0.8, label=None if number else "centroids")
    axes.set_title(title)
    axes.set(xlabel="weight / standard deviation of the merged kernel", ylabel="number of weights")
    add_legend(axes, 5)
    return f"Histogram of weights, {title}: the largest merged weight is {histogram.largest:.1f} standard deviations"


@return_svg
def draw_outliers(axes: Axes, runs: Sequence[Run]) -> str:
    """Largest merged weight over standard deviation, layer by layer."""
    layers = {run.title: run.exports[0]["outliers"] for run in runs}
    ratios = {title: {layer["name"]: layer["outlier_ratio"] for layer in layers[title]} for title in layers}
    names = list(dict.fromkeys(name for ratio_of in ratios.values() for name in ratio_of))
    for number, (title, ratio_of) in enumerate(ratios.items()):
        axes.plot(
            [ratio_of[name] for name in names if name in ratio_of],
            [place for place, name in enumerate(names) if name in ratio_of],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=0.8,
            markersize=5,
            label=title or "merged kernel",
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("largest merged weight / standard deviation of the layer")
    add_legend(axes, 3)
    return "Outlier ratio of each layer. " + "; ".join(
        f"{title or 'merged kernel'}: up to {max(ratio_of.values()):.1f}" for title, ratio_of in ratios.items()
    )


@return_svg
def draw_size_and_accuracy(axes: Axes, runs: Sequence[Run]) -> str:
    """Top-1 by file size, with the Pareto front; hollow where the size is computed and no such file exists."""
    points = [point for run in runs for point in _list_sizes(run)]
    for title, colour in _colours_by_run(runs).items():
        for is_written in (True, False):
            chosen = [point for point in points if point[3] == title and point[4] == is_written]
            if chosen:
                axes.scatter(
                    [point[0] for point in chosen],
                    [point[1] for point in chosen],
                    s=26,
                    facecolor=colour if is_written else "none",
                    edgecolor=colour,
                    label=f"{title} {'as written' if is_written else 'if packed'}".strip(),
                )
    front = [points[index] for index in find_pareto_front([point[:2] for point in points])]
    sizes, accuracies = [point[0] for point in front], [point[1] for point in front]
    axes.plot(sizes, accuracies, color=INK, linewidth=0.8, alpha=0.6, label="Pareto front")
    axes.scatter(sizes, accuracies, s=80, facecolor="none", edgecolor=INK, linewidth=0.8)
    _label_sizes(axes, "file size")
    return "Top-1 by file size. On the Pareto front: " + "; ".join(
        f"{' '.join(filter(None, [title, label]))} {size:,} bytes {top1:.1f} %" for size, top1, label, title, _ in front
    )


def _label_sizes(axes, label):
    """Labels a logarithmic axis of bytes, and one of accuracy."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(EngFormatter(unit="B"))
    axes.tick_params(axis="x", which="both", labelrotation=30)
    axes.set(xlabel=label, ylabel="top-1, percent")
    add_legend(axes)


def _list_sizes(run):
    """(bytes, top-1, label, title of the run, whether there is such a file) of written files, and of packed ones."""
    for file in run.files:
        yield file.record["file_bytes"], file.top1, file.label, run.title, True
        for target, entry in file.record["targets"].items():
            if "top1_percent" in entry:
                yield entry["file_bytes"], entry["top1_percent"], f"{file.label}, {target}", run.title, True
        if file.packed_bytes < file.record["file_bytes"]:
            yield file.packed_bytes, file.top1, file.label, run.title, False


@return_svg
def draw_fit_curve(axes: Axes, curve: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Top-1 by size of the target's file: fitted levels as a line, uniform ones as points, by granularity."""
    series = {"fitted to the size": list(curve["fitted"])}
    for point in curve["uniform"]:
        series.setdefault(f"uniform, {point['name'].partition(' ')[2]}", []).append(point)
    for number, (name, points) in enumerate(series.items()):
        axes.plot(
            [point["file_bytes"] for point in points],
            [point["top1_percent"] for point in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=":" if number else "-",
            linewidth=0.8 if number else 1.4,
            markersize=5,
            label=name,
        )
    _label_sizes(axes, "size of the target's file")
    return "Top-1 by size of the target's file. " + "; ".join(
        f"{name}: " + ", ".join(f"{point['file_bytes']:,} bytes {point['top1_percent']:.1f} %" for point in points)
        for name, points in series.items()
    )


@return_svg
def draw_latency(axes: Axes, bars: Sequence[tuple[str, float, float]], title: str) -> str:
    """Median latencies as bars, with whiskers to the 90th percentile; bars are (label, p50, p90) in milliseconds."""
    labels, median, high = zip(*bars, strict=True)
    places = np.arange(len(bars))
    whiskers = [np.zeros(len(bars)), np.subtract(high, median)]
    style = {"ecolor": INK, "elinewidth": 0.8, "capsize": 2}
    axes.barh(places, median, height=0.4, color=COLOURS[0], xerr=whiskers, error_kw=style)
    for place, label in zip(places, labels, strict=True):  # above the bar: beside it, long labels would leave no room
        axes.text(0, place - 0.26, label, fontsize=8, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(bars) - 0.6, -0.8)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("milliseconds per image")
    axes.set_title(title)
    return f"{title}: " + "; ".join(f"{label} {p50:.3g} ms" for label, p50, _ in bars)


@return_svg
def draw_confusion(axes: Axes, counts: np.ndarray, labels: Sequence[str], title: str) -> str:
    """Number of images by true and predicted class; errors are coloured, the diagonal is not."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    errors = np.where(np.eye(len(counts), dtype=bool), np.nan, shares)
    from_transparent = LinearSegmentedColormap.from_list("errors", [(*to_rgb(_ERROR_COLOUR), 0), _ERROR_COLOUR])
    axes.imshow(errors, cmap=from_transparent, norm=PowerNorm(0.5, 0, 1))
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(
            column,
            row,
            counts[row, column],
            ha="center",
            va="center",
            fontsize=8 if counts.max() < 1000 else 6.5,
            alpha=0.75 if row == column else 1,
        )
    axes.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 3 else 90)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(visible=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title)
    return f"Confusion matrix, {title}: {np.trace(counts)} of {counts.sum()} predictions are correct"
