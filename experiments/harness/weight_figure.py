"""A picture of merged weights: where the centre-tap diagonal lies among all others, layer by layer."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras

from tf_repvgg import storage
from tf_repvgg.layers import ReparameterizedBlock

COLOURS = {"other weights": "#4878a8", "centre-tap diagonal": "#d1495b"}


def list_identity_blocks(model: keras.Model) -> list[str]:
    """Names of the blocks that may have an identity branch."""
    blocks = (layer for layer in model.layers if isinstance(layer, ReparameterizedBlock))
    return [block.name for block in blocks if block.conv3x3.kernel.shape[2] == block.filters]


def split_kernel(block: ReparameterizedBlock) -> tuple[np.ndarray, np.ndarray]:
    """Weights on the diagonal of the centre tap, and all others, in standard deviations of the others."""
    kernel = block.equivalent_kernel_and_bias()[0].numpy()
    is_on_diagonal = np.zeros(kernel.shape, bool)
    inputs, outputs = kernel.shape[2:]
    is_on_diagonal[1, 1, np.arange(outputs) % inputs, np.arange(outputs)] = True
    std = np.std(kernel[~is_on_diagonal])
    return kernel[is_on_diagonal] / std, kernel[~is_on_diagonal] / std


def draw(models: Mapping[str, keras.Model], path: Path) -> None:
    """Writes a PNG: one column per model, one row per block that may have an identity branch.

    Args:
      models: Training-form models of one architecture by title.
      path: File to write.
    """
    names = list_identity_blocks(next(iter(models.values())))
    splits = {title: [split_kernel(model.get_layer(name)) for name in names] for title, model in models.items()}
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
        largest = max(np.max(np.abs(weights)) for title in models for weights in splits[title][row])
        edges = np.linspace(-largest, largest, 81)
        for axis, title in zip(axes[row], models, strict=True):
            diagonal, others = splits[title][row]
            for label, weights in (("other weights", others), ("centre-tap diagonal", diagonal)):
                axis.hist(weights, edges, color=COLOURS[label], label=label, log=True)
            axis.set_title(f"{title}, {name}", fontsize=9)
            extreme = max(np.max(np.abs(diagonal)), np.max(np.abs(others)))
            axis.annotate(f"largest {extreme:.0f} std", (0.98, 0.85), xycoords="axes fraction", ha="right", fontsize=8)
        axes[row, 0].set_ylabel("weights", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("merged weight / standard deviation of the other weights", fontsize=8)
    axes[0, 0].legend(fontsize=7, loc="upper left")
    with storage.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
