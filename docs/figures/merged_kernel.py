"""The merged kernel of one block, with BN and with OABN: python docs/figures/merged_kernel.py"""

import matplotlib.pyplot as plt
import numpy as np
from style import BLUE, RED, ROOT, save

from tf_repvgg import runs

MODELS = {"BN": "cifar10_bn", "OABN": "cifar10_oabn"}
BLOCK = "stage2_block2"
CHANNELS = 40  # of 128, so that single weights are visible


def read_kernel(run):
    """The merged kernel [3, 3, in, out] in standard deviations."""
    model = runs.load_model(ROOT / "results" / "checkpoints" / run)
    kernel = model.get_layer(BLOCK).equivalent_kernel_and_bias()[0].numpy()
    return kernel / kernel.std()


def main():
    kernels = {title: read_kernel(run) for title, run in MODELS.items()}
    figure, axes = plt.subplots(
        2, len(kernels), figsize=(8.4, 6.4), height_ratios=(3, 1.5), sharey="row", layout="constrained"
    )
    edges = np.linspace(-16, 16, 97)
    for column, (title, kernel) in zip(axes.T, kernels.items(), strict=True):
        centre = kernel[1, 1]
        picture = column[0].imshow(centre[:CHANNELS, :CHANNELS], cmap="RdBu_r", vmin=-8, vmax=8)
        column[0].set(xlabel="output channel", title=f"{title}: centre tap of the merged 3x3 kernel")
        on_diagonal = np.zeros(kernel.shape, bool)
        on_diagonal[1, 1] = np.eye(kernel.shape[2], dtype=bool)
        column[1].hist(kernel[~on_diagonal], edges, color=BLUE, log=True, label="all other weights")
        column[1].hist(kernel[on_diagonal], edges, color=RED, log=True, label="diagonal of the centre tap")
        column[1].set(xlabel="weight / standard deviation of the kernel")
    axes[0, 0].set_ylabel("input channel")
    axes[1, 0].set_ylabel("weights")
    axes[1, 0].set_ylim(top=1e6)
    axes[1, 0].legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    figure.colorbar(picture, ax=axes[0], label="standard deviations", shrink=0.8, extend="both")
    save(figure, "merged_kernel.png")


if __name__ == "__main__":
    main()
