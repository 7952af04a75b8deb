"""The headline figure: merged weights of BN and OABN, and accuracy by bit width."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras

from harness.results.headline import MODELS
from harness.weight_figure import COLOURS, split_kernel
from tf_repvgg import storage

# The block whose identity branch, with BN, leaves the largest outliers among otherwise small weights.
BLOCK = "stage2_block2"
_LINES = {"BN": "#4878a8", "OABN": "#d1495b", "QARepVGG": "#8a8a8a"}
_CHANCE_PERCENT = 10
# The width at which the accuracies are written beside the lines.
_LABELLED_BITS = 4


def draw(models: Mapping[str, keras.Model], exports: Mapping[str, dict], path: Path) -> None:
    """Writes a PNG of 1800 pixels width, to be shown at 900.

    Args:
      models: Training-form models whose merged weights are shown, by title: two.
      exports: Contents of export.json by title: min-max quantization at all widths.
      path: File to write.
    """
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1))
    _draw_weights(left, models)
    _draw_accuracy(right, exports)
    with storage.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=200, format="png")
    plt.close(figure)


def _draw_weights(figure, models):
    splits = {title: split_kernel(model.get_layer(BLOCK)) for title, model in models.items()}
    largest = {title: max(np.max(np.abs(weights)) for weights in split) for title, split in splits.items()}
    edges = np.linspace(-max(largest.values()), max(largest.values()), 81)
    axes = figure.subplots(len(models), sharex=True, sharey=True)
    for axis, (title, (diagonal, others)) in zip(axes, splits.items(), strict=True):
        for label, weights in (("other weights", others), ("centre-tap diagonal", diagonal)):
            axis.hist(weights, edges, color=COLOURS[label], label=label, log=True)
        axis.set_title(f"{title}: largest weight {largest[title]:.0f} standard deviations", fontsize=10)
        axis.set_ylabel("weights (log)")
    axes[0].legend(fontsize=8, loc="upper left", handlelength=1, frameon=False)
    axes[-1].set_xlabel(f"merged weight of {BLOCK} / standard deviation")


def _draw_accuracy(figure, exports):
    axis = figure.subplots()
    for title in MODELS:
        files = [file for file in exports[title]["files"] if file["granularity"] == "per_tensor"]
        top1 = {file["weight_bits"]: file["top1_percent"] for file in files}
        axis.plot(top1.keys(), top1.values(), marker="o", color=_LINES[title], label=title)
        offset = (8, 0) if title == "OABN" else (-8, -6)
        place = {"xytext": offset, "textcoords": "offset points", "ha": "left" if offset[0] > 0 else "right"}
        axis.annotate(
            f"{top1[_LABELLED_BITS]:.1f}", (_LABELLED_BITS, top1[_LABELLED_BITS]), color=_LINES[title], **place
        )
    axis.axhline(_CHANCE_PERCENT, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (max(top1), _CHANCE_PERCENT), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axis.set_xticks(list(top1))
    axis.invert_xaxis()
    axis.set_ylim(0, 100)
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("CIFAR-10 top-1 in percent")
    axis.set_title("min-max quantization, one scale per layer", fontsize=10)
    axis.grid(alpha=0.2)
    axis.legend(frameon=False)
