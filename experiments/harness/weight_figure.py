"""A picture of merged weights: where the centre-tap diagonal lies among all others, layer by layer."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from tf_repvgg import storage
from tf_repvgg.layers import ReparameterizedBlock

_COLOURS = {"other weights": "#4878a8", "centre-tap diagonal": "#d1495b"}


def _split(block):
    """(weights on the diagonal of the centre tap, all other weights), in standard deviations of the others."""
    kernel = block.equivalent_kernel_and_bias()[0].numpy()
    on_diagonal = np.zeros(kernel.shape, bool)
    inputs, outputs = kernel.shape[2:]
    on_diagonal[1, 1, np.arange(outputs) % inputs, np.arange(outputs)] = True
    spread = np.std(kernel[~on_diagonal])
    return kernel[on_diagonal] / spread, kernel[~on_diagonal] / spread


def draw(models: dict, path) -> None:
    """Writes a PNG: one column per model, one row per block that may have an identity branch.

    Args:
      models: training-form models of one architecture by title.
      path: file to write.
    """
    names = [
        layer.name
        for layer in next(iter(models.values())).layers
        if isinstance(layer, ReparameterizedBlock) and layer.conv3x3.kernel.shape[2] == layer.filters
    ]
    splits = {title: [_split(model.get_layer(name)) for name in names] for title, model in models.items()}
    figure, axes = plt.subplots(
        len(names),
        len(models),
        figsize=(4.2 * len(models), 1.5 * len(names) + 1.2),
        sharex="row",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, name in enumerate(names):
        largest = max(np.max(np.abs(part)) for title in models for part in splits[title][row])
        edges = np.linspace(-largest, largest, 81)
        for axis, title in zip(axes[row], models, strict=True):
            diagonal, others = splits[title][row]
            axis.hist(others, edges, color=_COLOURS["other weights"], label="other weights", log=True)
            axis.hist(diagonal, edges, color=_COLOURS["centre-tap diagonal"], label="centre-tap diagonal", log=True)
            axis.set_title(f"{title}, {name}", fontsize=9)
            reach = max(np.max(np.abs(diagonal)), np.max(np.abs(others)))
            axis.annotate(f"largest {reach:.0f} std", (0.98, 0.85), xycoords="axes fraction", ha="right", fontsize=8)
        axes[row, 0].set_ylabel("weights", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("merged weight / standard deviation of the other weights", fontsize=8)
    axes[0, 0].legend(fontsize=7, loc="upper left")
    with storage.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
