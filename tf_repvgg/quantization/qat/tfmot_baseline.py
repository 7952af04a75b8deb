"""Plain tfmot 0.8.1 as a baseline: weight clustering, then its cluster-preserving quantization-aware training.

tfmot's models are trained as they are. The codes and ranges that its quantization-aware training finds then move into a
model of this package, so that the baseline ends in the same exact files as the other methods.

Example:
  >>> import tf_keras as keras
  >>> from tf_repvgg.quantization.qat import tfmot_baseline
  >>> inputs = keras.Input((5,), name="features")
  >>> model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(inputs))
  >>> [layer.name for layer in tfmot_baseline.tfmot_cluster(model, number_of_clusters=4).layers]
  ['features', 'cluster_dense']
"""

from collections.abc import Mapping

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)
from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.cluster_preserve import (
    default_8bit_cluster_preserve_quantize_scheme as cluster_preserve,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import QuantizeLayer
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import QuantizeWrapper

from tf_repvgg import graph
from tf_repvgg.quantization.activations import quantize_activations, quantizers
from tf_repvgg.quantization.biases import make_room_for_biases
from tf_repvgg.quantization.checks import clusters_by_layer
from tf_repvgg.quantization.qat import wrapping
from tf_repvgg.quantization.quantized_layers import bias_of, fill_on_call, make_quantized_layer
from tf_repvgg.quantization.uniform import LARGEST_CODE

_ANY_SIZE = 32  # of images, for models whose input has no fixed size


def tfmot_cluster(
    model: keras.Model,
    number_of_clusters: int | str | Mapping[str, int],
    cluster_centroids_init: CentroidInitialization = CentroidInitialization.KMEANS_PLUS_PLUS,
    cluster_per_channel: bool = False,
    cluster_gradient_aggregation: GradientAggregation = GradientAggregation.SUM,
) -> keras.Model:
    """Copies a fused model for training, with tfmot's `cluster_weights` on every Conv2D and Dense layer.

    tfmot does not cluster depthwise kernels.

    Args:
      model: Functional deploy-form model.
      number_of_clusters: Number of clusters in a codebook, from 2 to 256, or numbers by pattern of layer names, first
        match wins; also as text: "stem=256,.*=8".
      cluster_centroids_init: Initialization of the centroids.
      cluster_per_channel: Whether every output channel has its own centroids; tfmot supports it for convolutions only.
      cluster_gradient_aggregation: Aggregation of the gradient to a centroid over its weights. The sum over thousands
        of weights is too large for SGD at learning rates that suit the weights.

    Returns:
      A model of tfmot's wrappers, not compiled.

    Raises:
      ValueError: If the model is not functional or not fused, a number is out of range, or a pattern matches no layer.
    """
    _check_model(model)
    clusters = clusters_by_layer(model, number_of_clusters)

    def cluster(layer):
        if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            return layer
        return tfmot.clustering.keras.cluster_weights(
            layer,
            number_of_clusters=clusters[layer.name],
            cluster_centroids_init=cluster_centroids_init,
            cluster_gradient_aggregation=cluster_gradient_aggregation,
            **({"cluster_per_channel": cluster_per_channel} if isinstance(layer, keras.layers.Conv2D) else {}),
        )

    return keras.models.clone_model(_copy_flat(model), clone_function=cluster)


def tfmot_quantize(model: keras.Model) -> keras.Model:
    """Copies a model with clustered weights for tfmot's cluster-preserving 8-bit quantization-aware training.

    Args:
      model: Functional deploy-form model, such as one that `tfmot.clustering.keras.strip_clustering` returns.

    Returns:
      A model of tfmot's wrappers, not compiled.

    Raises:
      ValueError: If the model is not functional or not fused, or has layers that tfmot does not support.
    """
    _check_model(model)
    annotated = tfmot.quantization.keras.quantize_annotate_model(_copy_flat(model))
    scheme = cluster_preserve.Default8BitClusterPreserveQuantizeScheme()
    return tfmot.quantization.keras.quantize_apply(annotated, scheme)


def strip_tfmot_quantize(model: keras.Model, base: keras.Model) -> keras.Model:
    """Moves codes and ranges that tfmot's quantization-aware training has found into quantized layers of this package.

    Args:
      model: Trained model of `tfmot_quantize`.
      base: Model from which `tfmot_quantize` made it.

    Returns:
      A model of `QuantizedLayer`s and `ActivationQuantizer`s, ready for `tf_repvgg.tflite.convert`.

    Raises:
      ValueError: If the model has no layers of tfmot's, or tfmot has trained no range where a file needs one.
    """
    wrappers = {layer.layer.name: layer for layer in model.layers if isinstance(layer, QuantizeWrapper)}
    if not wrappers:
        raise ValueError(f"model {model.name!r} holds no layers of tfmot's quantization-aware training")
    # Evaluation leaves the quantized kernel in each wrapped layer.
    model(np.zeros([1, *(size or _ANY_SIZE for size in model.input_shape[1:])], np.float32), training=False)

    def replace(layer, changes):
        wrapper = wrappers[changes["name"]]
        kernel, scale = _kernel_and_scale(wrapper)
        quantized_layer = make_quantized_layer(layer, len(scale) > 1, **changes)
        return fill_on_call(quantized_layer, kernel, scale, bias_of(wrapper.layer))

    stripped = quantize_activations(base, replace)
    ranges = {name: _range(wrapper) for name, wrapper in wrappers.items()}
    (input_quantizer,) = (layer for layer in model.layers if isinstance(layer, QuantizeLayer))
    ranges[stripped.inputs[0].node.layer.name] = _range(input_quantizer)
    for quantizer in quantizers(stripped):
        if (name := quantizer.name.removesuffix("_quantizer")) not in ranges:
            raise ValueError(
                f"tfmot has trained no activation range after layer {name!r}; this baseline supports plain chains of "
                "layers only"
            )
        quantizer.set_range(*ranges[name])
    make_room_for_biases(stripped)
    return stripped


def _check_model(model):
    wrapping.check_model(model)
    if transposed := graph.find_layers(model, keras.layers.Conv2DTranspose):
        raise ValueError(
            f"layer {transposed[0].name!r} is a Conv2DTranspose, which tfmot's training of clustered weights does not "
            "support; use cluster_quantize"
        )


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


def _copy_flat(model):
    """Copies a model, its nested models inlined: tfmot clones layer by layer, and must not touch the user's layers."""
    return graph.rebuild(model, graph.copy_layer, inline_nested=True)
