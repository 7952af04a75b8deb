"""Index bits of each layer at three budgets, and accuracy over the size of the file: python docs/figures/fitting.py"""

import json

import matplotlib.pyplot as plt
import numpy as np
from style import BLUE, GREEN, GREY, RED, ROOT, save

MODEL, METHOD, TARGET = "cifar10_oabn", "codebook", "tflm_lut"
BUDGETS = {16: GREEN, 8: BLUE, 4: RED}  # the bytes of so many clusters


def find_cells(way):
    """{number of clusters: cell} of the model, by the way in which its levels were chosen."""
    cells = json.loads((ROOT / "results" / "fit.json").read_text(encoding="utf-8"))["cells"]
    return {
        cell["clusters"]: cell
        for cell in cells
        if (cell["model"], cell["method"], cell["target"], cell["way"]) == (MODEL, METHOD, TARGET, way)
    }


def main():
    fitted, uniform = find_cells("fitted"), find_cells("uniform")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=[3, 2])
    layers = list(fitted[4]["levels"])
    for place, (clusters, colour) in enumerate(BUDGETS.items()):
        levels = [fitted[clusters]["levels"][layer].split(" ", 1) for layer in layers]
        bits = [np.log2(int(number)) for number, _ in levels]
        positions = np.arange(len(layers)) + 0.27 * (place - 1)
        bars = left.bar(positions, bits, 0.25, color=colour, label=f"bytes of {clusters} clusters")
        for bar, (_, granularity) in zip(bars, levels, strict=True):
            bar.set_hatch("" if granularity == "per tensor" else "///")
            bar.set_edgecolor("white")
    left.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    left.set(ylabel="log2 of clusters", title="Fitted levels; hatched: codebooks per channel")
    left.set_ylim(0, 9.6)
    left.legend(loc="upper center", ncols=3, fontsize=8)
    for cells, colour, label in ((fitted, BLUE, "fitted"), (uniform, GREY, "uniform")):
        points = sorted((cell["measured"]["file_bytes"] / 1000, cell["top1_percent"]) for cell in cells.values())
        right.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    right.set(xlabel="file for TFLite Micro, kB", ylabel="top-1, percent", title="16, 8, 6, 4 and 3 clusters")
    right.legend()
    save(figure, "fitting.svg")


if __name__ == "__main__":
    main()
