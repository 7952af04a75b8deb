"""Statistics of the merged weights of a model, layer by layer and branch by branch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tf_keras as keras
from tabulate import tabulate

from tf_repvgg import graph
from tf_repvgg.layers import OutlierAwareBatchNormalization, ReparameterizedBlock

# Their kernels have output channels before input channels.
_TRANSPOSED_LAYERS = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
# Separable and transposed convolutions are subclasses of these.
_LAYERS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Dense,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


@dataclasses.dataclass(frozen=True)
class KernelStatistics:
    """Statistics of one merged kernel.

    Attributes:
      name: Name of the layer; "<layer>/depthwise" and "<layer>/pointwise" for the kernels of a separable convolution.
      std: Standard deviation of all weights.
      largest: Largest magnitude of a weight.
      outlier_ratio: Quotient largest / std, which a per-tensor grid has to span.
      channel_outlier_ratio: Median over the output channels of the same quotient within a channel.
      kurtosis: Fourth standardized moment of the weights; 3 for a normal distribution.
      branch_largest: Largest magnitude of each branch's part in the kernel; empty for plain layers.
      gamma_over_sigma: Smallest, median and largest |gamma| / sqrt(variance + epsilon) of the identity branch's
        normalization, for the gamma in force; None for a layer without one.
      clipped_share: Share of the identity branch's gammas at OABN's limit; None without OABN.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import outliers
      >>> model = keras.Sequential([keras.layers.Dense(2, name="dense", input_shape=[2])])
      >>> model.set_weights([np.array([[1.0, -1.0], [1.0, -3.0]]), np.zeros(2)])
      >>> (statistics,) = outliers.report(model)
      >>> statistics.name, statistics.largest, round(statistics.outlier_ratio, 2)
      ('dense', 3.0, 1.81)
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


def report(model: keras.Model, print_fn: Callable[[str], object] | None = None) -> list[KernelStatistics]:
    """Computes statistics of every block (merged), convolution and dense layer of a model in either form.

    Convolutions are those of any kind: grouped, depthwise, separable and transposed, of one to three dimensions.

    Args:
      model: Any Keras model.
      print_fn: Function that receives a readable table; None for no table.

    Example:
      >>> from tf_repvgg import outliers
      >>> from tf_repvgg.models import build_repvgg
      >>> statistics = outliers.report(build_repvgg("digits", (8, 8, 1), num_classes=10))
      >>> [layer.name for layer in statistics][:3]
      ['stem', 'stage1_block1', 'stage1_block2']
      >>> sorted(statistics[1].branch_largest)
      ['conv1x1', 'conv3x3', 'identity']
    """
    statistics = []
    for layer in graph.find_layers(model):
        if isinstance(layer, ReparameterizedBlock):
            statistics.append(_describe_block(layer))
        elif isinstance(layer, _LAYERS) and not _is_inside_block(layer, model):
            statistics += [_describe_kernel(name, kernel) for name, kernel in _find_kernels(layer).items()]
    if print_fn is not None:
        print_fn(_make_table(statistics))
    return statistics


def as_records(statistics: Sequence[KernelStatistics]) -> list[dict[str, Any]]:
    """Converts statistics to JSON-serializable dictionaries.

    Example:
      >>> from tf_repvgg import outliers
      >>> from tf_repvgg.models import build_repvgg
      >>> (stem, *_) = outliers.as_records(outliers.report(build_repvgg("digits", (8, 8, 1), num_classes=10)))
      >>> stem["name"], stem["gamma_over_sigma"]
      ('stem', None)
    """
    return [dataclasses.asdict(layer) for layer in statistics]


def _is_inside_block(layer, model):
    blocks = graph.find_layers(model, ReparameterizedBlock)
    return any(layer is inner for block in blocks for inner in block.get_convolutions().values())


def _find_kernels(layer):
    """{name: kernel with output channels last} of a layer; a separable convolution has two."""
    if isinstance(layer, keras.layers.SeparableConv1D | keras.layers.SeparableConv2D):
        return {
            f"{layer.name}/depthwise": _flatten_depthwise(layer.depthwise_kernel.numpy()),
            f"{layer.name}/pointwise": layer.pointwise_kernel.numpy(),
        }
    if isinstance(layer, keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D):
        return {layer.name: _flatten_depthwise(layer.depthwise_kernel.numpy())}
    is_transposed = isinstance(layer, _TRANSPOSED_LAYERS)
    return {layer.name: np.swapaxes(layer.kernel, -1, -2) if is_transposed else layer.kernel.numpy()}


def _flatten_depthwise(kernel):
    """The kernel [..., channels, depth multiplier] of a depthwise convolution as [..., 1, output channels]."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1)


def _describe_kernel(name, kernel, branch_largest=None, gamma_over_sigma=None, clipped_share=None):
    std = float(np.std(kernel))
    channels = kernel.reshape(-1, kernel.shape[-1])
    channel_std = np.std(channels, axis=0)
    alive = channel_std > 0
    ratios = np.max(np.abs(channels), axis=0)[alive] / channel_std[alive]
    centred = kernel - np.mean(kernel)
    largest = float(np.max(np.abs(kernel)))
    return KernelStatistics(
        name=name,
        std=std,
        largest=largest,
        outlier_ratio=largest / std if std else 0.0,
        channel_outlier_ratio=float(np.median(ratios)) if ratios.size else 0.0,
        kurtosis=float(np.mean(centred**4) / std**4) if std else 0.0,
        branch_largest=branch_largest or {},
        gamma_over_sigma=gamma_over_sigma,
        clipped_share=clipped_share,
    )


def _describe_block(block):
    kernel, _ = block.equivalent_kernel_and_bias()
    largest = {name: float(np.max(np.abs(branch))) for name, (branch, _) in block.branches().items()}
    norm = getattr(block, "norm_identity", None)
    if norm is None:
        return _describe_kernel(block.name, kernel.numpy(), largest)
    is_clipped = isinstance(norm, OutlierAwareBatchNormalization) and norm.clips
    gamma = np.abs((norm.effective_gamma() if is_clipped else norm.gamma).numpy())
    ratio = gamma / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    quantiles = tuple(float(value) for value in np.quantile(ratio, [0, 0.5, 1]))
    share = float(np.mean(gamma >= norm.gamma_limit().numpy() * (1 - 1e-6))) if is_clipped else None
    return _describe_kernel(block.name, kernel.numpy(), largest, quantiles, share)


def _make_table(statistics):
    rows = [
        [
            layer.name,
            layer.std,
            layer.largest,
            *(round(ratio, 1) for ratio in (layer.outlier_ratio, layer.channel_outlier_ratio, layer.kurtosis)),
            " .. ".join(f"{value:.3f}" for value in layer.gamma_over_sigma or ()),
            "" if layer.clipped_share is None else f"{100 * layer.clipped_share:.0f} %",
        ]
        for layer in statistics
    ]
    headers = ["layer", "std", "largest", "/ std", "per channel", "kurtosis", "identity gamma/sigma", "clipped"]
    return tabulate(rows, headers, floatfmt=".4g")
