"""Histograms of a few layers' weights, branch by branch."""

from collections.abc import Mapping

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, kernel_of
from tf_repvgg.report.records import Histogram

_SHOWN_LAYERS = 4
_BINS = 81


def make_histograms(model: keras.Model, codebooks: Mapping[str, list[float]]) -> list[Histogram]:
    """Makes histograms of a few layers evenly from first to last: blocks that may have an identity branch, if any.

    Args:
      model: Any Keras model.
      codebooks: {name of a layer, as in `tf_repvgg.graph.unique_names`: distinct weights of a file}.
    """
    names = graph.unique_names(model)
    blocks = graph.find_layers(model, ReparameterizedBlock)
    # Also blocks without the branch: other runs of the architecture have it in the same layers.
    keep_channels = [block for block in blocks if block.may_have_identity]
    layers = keep_channels or blocks or graph.find_layers(model, WEIGHTED_LAYERS)
    picks = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _SHOWN_LAYERS)).round().astype(int))
    shown = [(layers[pick], names.get(id(layers[pick]), layers[pick].name)) for pick in picks]
    return [_make_histogram(layer, name, codebooks.get(name)) for layer, name in shown]


def _make_histogram(layer, name, codebook):
    if isinstance(layer, ReparameterizedBlock):
        merged = layer.equivalent_kernel_and_bias()[0].numpy()
        branches = {branch: kernel.numpy() for branch, (kernel, _) in layer.branches().items()}
    else:
        merged, branches = kernel_of(layer), {}
    std = float(np.std(merged)) or 1.0
    largest = max(float(np.max(np.abs(kernel))) for kernel in (merged, *branches.values())) / std
    edges = np.linspace(-largest, largest, _BINS + 1)
    return Histogram(
        layer=name,
        edges=edges,
        merged=np.histogram(merged / std, edges)[0],
        branches={branch: np.histogram(kernel[kernel != 0] / std, edges)[0] for branch, kernel in branches.items()},
        largest=float(np.max(np.abs(merged))) / std,
        codebook=codebook and [weight / std for weight in codebook],
    )
