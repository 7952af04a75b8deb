"""What the weights of a model look like, layer by layer and branch by branch, once merged."""

import dataclasses

import numpy as np
import tf_keras as keras
from tabulate import tabulate

from tf_repvgg import graph
from tf_repvgg.layers import OutlierAwareBatchNormalization, ReparameterizedBlock


@dataclasses.dataclass(frozen=True)
class KernelStatistics:
    """Statistics of one merged kernel.

    Attributes:
      name: layer.
      std: standard deviation of all its weights.
      largest: largest magnitude.
      outlier_ratio: largest / std, what a per-tensor grid has to span.
      channel_outlier_ratio: the same within each output channel, the median over channels.
      kurtosis: fourth standardized moment; 3 for a normal distribution.
      branch_largest: largest magnitude that each branch adds; empty for plain layers.
      gamma_over_sigma: |gamma| / sqrt(variance + epsilon) of the identity's normalization, as (smallest, median,
        largest), on the gamma in force; None without one.
      clipped_share: share of the identity's gammas that sit at OABN's limit; None without OABN.
    """

    name: str
    std: float
    largest: float
    outlier_ratio: float
    channel_outlier_ratio: float
    kurtosis: float
    branch_largest: dict[str, float]
    gamma_over_sigma: tuple[float, float, float] | None
    clipped_share: float | None


def report(model: keras.Model, print_fn=None) -> list[KernelStatistics]:
    """Statistics of every block (merged), convolution and dense layer of a model, in either form.

    Args:
      model: any Keras model.
      print_fn: if given, a readable table is printed with it.
    """
    found = []
    for layer in graph.find_layers(model):
        if isinstance(layer, ReparameterizedBlock):
            found.append(_of_block(layer))
        elif isinstance(layer, keras.layers.Conv2D | keras.layers.Dense) and not _is_inside_block(layer, model):
            found.append(_of_kernel(layer.name, layer.kernel.numpy()))
    if print_fn is not None:
        _print(found, print_fn)
    return found


def as_records(statistics: list[KernelStatistics]) -> list[dict]:
    """The statistics as JSON-serializable dictionaries."""
    return [dataclasses.asdict(entry) for entry in statistics]


def _is_inside_block(layer, model):
    blocks = graph.find_layers(model, ReparameterizedBlock)
    return any(layer is inner for block in blocks for inner in (block.conv3x3, block.conv1x1))


def _of_kernel(name, kernel, **of_block):
    std = float(np.std(kernel))
    channels = kernel.reshape(-1, kernel.shape[-1])
    channel_std = np.std(channels, axis=0)
    alive = channel_std > 0
    ratios = np.max(np.abs(channels), axis=0)[alive] / channel_std[alive]
    centred = kernel - np.mean(kernel)
    largest = float(np.max(np.abs(kernel)))
    defaults = {"branch_largest": {}, "gamma_over_sigma": None, "clipped_share": None}
    return KernelStatistics(
        name=name,
        std=std,
        largest=largest,
        outlier_ratio=largest / std if std else 0.0,
        channel_outlier_ratio=float(np.median(ratios)) if ratios.size else 0.0,
        kurtosis=float(np.mean(centred**4) / std**4) if std else 0.0,
        **defaults | of_block,
    )


def _of_block(block):
    kernel, _ = block.equivalent_kernel_and_bias()
    largest = {name: float(np.max(np.abs(branch))) for name, (branch, _) in block.branches().items()}
    norm = getattr(block, "norm_identity", None)
    if norm is None:
        return _of_kernel(block.name, kernel.numpy(), branch_largest=largest)
    is_clipped = isinstance(norm, OutlierAwareBatchNormalization) and norm.clips
    gamma = np.abs((norm.effective_gamma() if is_clipped else norm.gamma).numpy())
    ratio = gamma / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    quantiles = tuple(float(value) for value in np.quantile(ratio, [0, 0.5, 1]))
    share = float(np.mean(gamma >= norm.gamma_limit().numpy() * (1 - 1e-6))) if is_clipped else None
    return _of_kernel(
        block.name, kernel.numpy(), branch_largest=largest, gamma_over_sigma=quantiles, clipped_share=share
    )


def _print(statistics, print_fn):
    rows = [
        [
            entry.name,
            entry.std,
            entry.largest,
            *(round(ratio, 1) for ratio in (entry.outlier_ratio, entry.channel_outlier_ratio, entry.kurtosis)),
            " .. ".join(f"{value:.3f}" for value in entry.gamma_over_sigma or ()),
            "" if entry.clipped_share is None else f"{100 * entry.clipped_share:.0f} %",
        ]
        for entry in statistics
    ]
    headers = ["layer", "std", "largest", "/ std", "per channel", "kurtosis", "identity gamma/sigma", "clipped"]
    print_fn(tabulate(rows, headers, floatfmt=".4g"))
