"""What merged weights and activations of a model look like: layer by layer, branch by branch, image by image."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
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

# Layers whose outputs are looked at.
_OBSERVED_LAYERS = (ReparameterizedBlock, *_LAYERS, keras.layers.Activation, keras.layers.ReLU, keras.layers.Add)
# An image is extreme if its activations reach so many times as far as those of the median image: a range of 8 bits that
# holds them leaves the median image less than 13 of its 256 levels.
EXTREME_FACTOR = 20


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


@dataclasses.dataclass(frozen=True)
class ActivationStatistics:
    """How far the outputs of one layer reach, image by image.

    Attributes:
      name: Name of the layer.
      median: Median over the images of the largest magnitude of an output.
      percentile_99: Its 99th percentile.
      largest: Its largest value.
      image: Index of the image that reaches farthest.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg import outliers
      >>> (layer,) = outliers.describe_activations({"relu": np.array([1.0, 2.0, 60.0])})
      >>> layer.median, layer.image, layer.factor
      (2.0, 2, 30.0)
    """

    name: str
    median: float
    percentile_99: float
    largest: float
    image: int

    @property
    def factor(self) -> float:
        """Quotient largest / median; infinite if only the median is 0."""
        if self.median:
            return self.largest / self.median
        return float("inf") if self.largest else 1.0


def report_activations(
    model: keras.Model, batches: Iterable[Any], print_fn: Callable[[str], object] | None = None
) -> list[ActivationStatistics]:
    """Computes statistics of the outputs of every block, convolution, dense layer, activation and addition of a model.

    Where single images reach many times as far as all others, a range from the smallest to the largest value leaves few
    levels to the others; a line names each such layer.

    Args:
      model: Functional model, nested models included, in float.
      batches: Batches of images as the model takes them, float32 [batch, height, width, channels]; of a model with
        several inputs, a list of one such array for each.
      print_fn: Function that receives a readable table, and warnings; None for none.

    Raises:
      ValueError: If there are no images.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg import outliers
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), num_classes=10)
      >>> images = np.random.default_rng(0).normal(size=[16, 8, 8, 1]).astype("float32")
      >>> [layer.name for layer in outliers.report_activations(model, [images])][:2]
      ['stem', 'stage1_block1']
    """
    statistics = describe_activations(measure_activations(model, batches))
    if print_fn is not None:
        print_fn(_make_activations_table(statistics))
        for layer in statistics:
            if layer.factor > EXTREME_FACTOR:
                print_fn(
                    f"warning: on image {layer.image}, {layer.name} reaches {layer.factor:.3g} times as far as on the "
                    "median image; --ptq=relative finds a range for all images"
                )
    return statistics


def measure_activations(model: keras.Model, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """{name of a layer: largest magnitude of its outputs on each image, [images]}; see `report_activations`."""
    names = graph.unique_names(model)
    parts = [_measure_batch(model, batch, names) for batch in batches]
    if not parts:
        raise ValueError("there are no images; give at least one batch")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def describe_activations(magnitudes: Mapping[str, np.ndarray]) -> list[ActivationStatistics]:
    """Statistics of what `measure_activations` returns."""
    return [
        ActivationStatistics(
            name=name,
            median=float(np.median(values)),
            percentile_99=float(np.percentile(values, 99)),
            largest=float(np.max(values)),
            image=int(np.argmax(values)),
        )
        for name, values in magnitudes.items()
    ]


def find_extreme_images(magnitudes: Mapping[str, np.ndarray], count: int = 6) -> list[dict[str, Any]]:
    """The images that reach farthest beyond the median image in some layer, the farthest first, ready for JSON.

    Args:
      magnitudes: What `measure_activations` returns.
      count: Largest number of images.

    Returns:
      For each image its index ("image"), and how many times as far as on the median image each layer reaches, where
      that is not 0 ("factors", by name of the layer).

    Example:
      >>> import numpy as np
      >>> from tf_repvgg import outliers
      >>> outliers.find_extreme_images({"relu": np.array([1.0, 2.0, 60.0])}, count=1)
      [{'image': 2, 'factors': {'relu': 30.0}}]
    """
    medians = {name: float(np.median(values)) for name, values in magnitudes.items()}
    factors = {name: values / medians[name] for name, values in magnitudes.items() if medians[name]}
    if not factors:
        return []
    order = np.argsort(-np.max(list(factors.values()), axis=0), kind="stable")[:count]
    return [
        {"image": int(image), "factors": {name: float(values[image]) for name, values in factors.items()}}
        for image in order
    ]


def as_records(statistics: Sequence[KernelStatistics | ActivationStatistics]) -> list[dict[str, Any]]:
    """Converts statistics to JSON-serializable dictionaries.

    Example:
      >>> from tf_repvgg import outliers
      >>> from tf_repvgg.models import build_repvgg
      >>> (stem, *_) = outliers.as_records(outliers.report(build_repvgg("digits", (8, 8, 1), num_classes=10)))
      >>> stem["name"], stem["gamma_over_sigma"]
      ('stem', None)
    """
    return [dataclasses.asdict(layer) for layer in statistics]


def _measure_batch(model, batch, names):
    """{name: largest magnitudes [images]} of one batch."""
    magnitudes: dict[str, tf.Tensor] = {}

    def observe(layer):
        if graph.is_functional(layer):
            return lambda inputs, **_: graph.replay(layer, tf.nest.flatten(inputs), observe)
        call = graph.infer(layer)
        if not isinstance(layer, _OBSERVED_LAYERS):
            return call

        def call_and_measure(*arguments, **keywords):
            outputs = call(*arguments, **keywords)
            largest = tf.reduce_max(tf.abs(tf.cast(outputs, tf.float32)), axis=range(1, len(outputs.shape)))
            name = names[id(layer)]
            magnitudes[name] = tf.maximum(magnitudes[name], largest) if name in magnitudes else largest
            return outputs

        return call_and_measure

    graph.replay(model, [tf.convert_to_tensor(images) for images in tf.nest.flatten(batch)], observe)
    return {name: values.numpy() for name, values in magnitudes.items()}


def _make_activations_table(statistics):
    rows = [
        [layer.name, layer.median, layer.percentile_99, layer.largest, f"{layer.factor:.1f}", layer.image]
        for layer in statistics
    ]
    headers = ["layer", "median image", "99 %", "largest", "/ median", "image"]
    return tabulate(rows, headers, floatfmt=".4g")


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
