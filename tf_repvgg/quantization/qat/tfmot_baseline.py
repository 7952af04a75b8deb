"""Plain tfmot 0.8.1 as a baseline: weight clustering, then its cluster-preserving quantization-aware training.

Its models are trained as they are. What its quantization-aware training found, codes and ranges, then moves into a
model of this package, so that the baseline ends in the same exact files as all else.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation
from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.cluster_preserve import (
    default_8bit_cluster_preserve_quantize_scheme as preserving,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import QuantizeLayer
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import QuantizeWrapper

from tf_repvgg import graph
from tf_repvgg.quantization.activations import quantize_activations, quantizers
from tf_repvgg.quantization.checks import values_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.quantized_layers import bias_of, fill_weights, quantized_form
from tf_repvgg.quantization.uniform import LARGEST_CODE


def tfmot_cluster(
    model: keras.Model,
    number_of_clusters: int | str | Mapping[str, int],
    cluster_centroids_init=tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS,
    cluster_per_channel: bool = False,
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM,
) -> keras.Model:
    """tfmot's `cluster_weights` on every Conv2D and Dense layer of a fused model; to be trained.

    Args:
      model, number_of_clusters, cluster_per_channel: as for `tf_repvgg.quantization.cluster_quantize`; tfmot knows
        clusters per channel for convolutions only, and does not cluster depthwise kernels.
      cluster_centroids_init: one of tfmot's.
      cluster_gradient_aggregation: of the gradient to centroids; the sum, over thousands of weights, is too large for
        SGD at rates that suit the weights.

    Raises:
      ValueError: as `cluster_quantize`.
    """
    wrapping.check_model(model)
    states = values_by_layer(model, number_of_clusters, "numbers of clusters", 2, 256)

    def clustered(layer):
        if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            return layer
        return tfmot.clustering.keras.cluster_weights(
            layer,
            number_of_clusters=states[layer.name],
            cluster_centroids_init=cluster_centroids_init,
            cluster_gradient_aggregation=cluster_gradient_aggregation,
            **({"cluster_per_channel": cluster_per_channel} if isinstance(layer, keras.layers.Conv2D) else {}),
        )

    return keras.models.clone_model(_flat_copy(model), clone_function=clustered)


def tfmot_quantize(model: keras.Model) -> keras.Model:
    """tfmot's cluster-preserving 8-bit quantization-aware training of a model with clustered weights; to be trained.

    Raises:
      ValueError: for a model that is not functional or not fused, and layers that tfmot does not know.
    """
    wrapping.check_model(model)
    annotated = tfmot.quantization.keras.quantize_annotate_model(_flat_copy(model))
    return tfmot.quantization.keras.quantize_apply(annotated, preserving.Default8BitClusterPreserveQuantizeScheme())


def strip_tfmot_quantize(model: keras.Model, base: keras.Model) -> keras.Model:
    """What tfmot's quantization-aware training found, as a model of quantized layers for `tf_repvgg.tflite.convert`.

    Args:
      model: trained model of `tfmot_quantize`.
      base: the model that it was made of.

    Raises:
      ValueError: if the model is not tfmot's.
    """
    wrappers = {layer.layer.name: layer for layer in model.layers if isinstance(layer, QuantizeWrapper)}
    if not wrappers:
        raise ValueError(f"model {model.name!r} holds no layers of tfmot's quantization-aware training")
    # Evaluation leaves each wrapped layer with the kernel that it multiplies with.
    model(np.zeros([1, *(size or 32 for size in model.input_shape[1:])], np.float32), training=False)

    def replace(layer, changes):
        wrapper = wrappers[changes["name"]]
        kernel, scale = _kernel_and_scale(wrapper)
        form = quantized_form(layer, len(scale) > 1, **changes)
        return fill_weights(form, kernel, scale, bias_of(wrapper.layer))

    found = quantize_activations(base, replace)
    ranges = {name: _range(wrapper) for name, wrapper in wrappers.items()}
    (of_input,) = (layer for layer in model.layers if isinstance(layer, QuantizeLayer))
    ranges[found.inputs[0].node.layer.name] = _range(of_input)
    for quantizer in quantizers(found):
        if (name := quantizer.name.removesuffix("_quantizer")) not in ranges:
            raise ValueError(f"tfmot has trained no range after {name!r}; this baseline is for plain chains")
        quantizer.set_range(*ranges[name])
    wrapping.make_room_for_biases(found)
    return found


def _kernel_and_scale(wrapper):
    ((_, _, variables),) = wrapper._weight_vars
    return wrapper.layer.kernel.numpy(), np.reshape(variables["max_var"].numpy(), [-1]) / np.float32(LARGEST_CODE)


def _range(layer):
    """(minimum, maximum) that tfmot has trained for the output of a layer."""
    if isinstance(layer, QuantizeLayer):
        variables = layer.quantizer_vars
    elif layer._output_quantizers:
        variables = layer._output_quantizer_vars
    else:
        variables = layer._quantize_activations[0]._post_activation_vars
    return float(variables["min_var"]), float(variables["max_var"])


def _flat_copy(model):
    """tfmot clones models layer by layer; the layers must not be those of the user's model."""
    return graph.rebuild(model, graph.copy_layer, inline_nested=True)
