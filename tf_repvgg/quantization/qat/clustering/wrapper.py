"""tfmot's clustering wrapper with centroids that move during training and lie on the grid of the exported file."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import CentroidInitialization
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights

from tf_repvgg.quantization.checks import check_finite
from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining, MovingCodebook
from tf_repvgg.quantization.qat.wrapping import TrainingWrapper
from tf_repvgg.quantization.quantized_layers import (
    arrange_kernel,
    bias_of,
    fill_on_call,
    is_quantizable,
    kernel_name,
    make_quantized_layer,
    restore_kernel,
)


class ClusteringWrapper(TrainingWrapper):
    """Base of the wrappers that cluster weights.

    Subclasses have `_codebooks`, {name of a weight: `MovingCodebook`}, and a method `_latent_weights(name)`, which
    returns a weight as a matrix [rows, output channels].
    """

    stripped_by = "strip_cluster_quantize"

    _codebooks: dict[str, MovingCodebook]

    def freeze(self, frozen: bool = True) -> None:
        """Freezes which centroid each weight has, or unfreezes it; takes effect at once.

        While clusters are frozen, latent weights have no gradient, and what momentum and weight decay of the optimizer
        do to them has no effect. Centroids are frozen too, unless the optimizer trains them (`train_centroids`).

        Args:
          frozen: Whether clusters are frozen from now on.
        """
        for name, codebook in self._codebooks.items():
            codebook.freeze(self._latent_weights(name), frozen)

    def check_finite(self) -> None:
        """Refuses weights and centroids that are not finite, which codes would hide.

        Raises:
          ValueError: If there are any.
        """
        for name, codebook in self._codebooks.items():
            check_finite(self.layer, self._latent_weights(name), codebook.centroids)

    def clusters(self) -> dict[str, tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        """The clusters of each weight, for inspection.

        Returns:
          {name of the weight: (latent weights [rows, channels], centroids on their grid [1 or channels, clusters],
          index of each weight's centroid, int32 [rows, channels])}.
        """
        clusters = {}
        for name, codebook in self._codebooks.items():
            weights = self._latent_weights(name)
            clusters[name] = weights, codebook.grid(), codebook.assignments(weights)
        return clusters


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ClusterQuantize(ClusteringWrapper, ClusterWeights):
    """A layer whose kernel consists of a few centroids, each an int8 code times a scale, while latent weights train.

    Forward: every latent weight is replaced by its nearest centroid.

    Pseudo-gradient: straight through to the latent weights.

    In training, every `centroid_update_steps` steps, centroids move towards the mean of the weights nearest to them (a
    running step of Lloyd's algorithm), and clusters without weights start anew. The scale follows the largest centroid.

    Args:
      layer: Conv2D, Conv2DTranspose, DepthwiseConv2D or Dense layer, or a `tfmot.clustering.keras.ClusterableLayer`.
      number_of_clusters: Number of centroids in a codebook, from 2 to 256.
      cluster_centroids_init: Initialization of the centroids, one of tfmot's; None for k-means.
      cluster_per_channel: Whether every output channel has its own codebook, for Dense and DepthwiseConv2D too.
      **kwargs: Further fields of `CodebookTraining`, and keyword arguments of a Keras layer.

    Attributes:
      cluster_centroids: Centroids before they are rounded to the grid, {name of the weight: variable}.

    Raises:
      ValueError: If an argument is out of range, or the layer cannot be clustered.

    References: arXiv:2402.07200.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.qat.clustering import ClusterQuantize
      >>> layer = ClusterQuantize(keras.layers.Dense(8), number_of_clusters=4, cluster_per_channel=True)
      >>> outputs = layer(np.ones([1, 10], np.float32))
      >>> [tuple(tensor.shape) for tensor in layer.clusters()["kernel"]]
      [(10, 8), (8, 4), (10, 8)]
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        number_of_clusters: int,
        cluster_centroids_init: CentroidInitialization | None = None,
        cluster_per_channel: bool = False,
        **kwargs: Any,
    ) -> None:
        settings = {field: kwargs.pop(field) for field in CodebookTraining.__dataclass_fields__ if field in kwargs}
        self._training = CodebookTraining(number_of_clusters, cluster_centroids_init, cluster_per_channel, **settings)
        kwargs.setdefault("dtype", "float32")
        super().__init__(
            layer,
            number_of_clusters,
            cluster_centroids_init=cluster_centroids_init,
            cluster_gradient_aggregation=self._training.cluster_gradient_aggregation,
            **kwargs,
        )
        self.cluster_per_channel = cluster_per_channel  # tfmot's own wrapper supports it for Conv2D only
        if is_quantizable(layer):
            # tfmot skips depthwise kernels, for the accuracy that they lose, and weights that do not train.
            name = kernel_name(layer)
            layer.get_clusterable_weights = lambda: [(name, getattr(layer, name))]
        self._codebooks = {}

    def build(self, input_shape: Any) -> None:
        keras.layers.Wrapper.build(self, input_shape)
        self.build_input_shape = input_shape
        for name, weight in self.layer.get_clusterable_weights():
            # tfmot's bookkeeping: `call` puts a tensor in place of the layer's variable, which is kept here.
            self.original_clusterable_weights[name] = weight
            setattr(self, f"original_weight_{name}", weight)
            self.position_original_weights[[id(w) for w in self.layer.weights].index(id(weight))] = name
            self._codebooks[name] = MovingCodebook(self, name, self._latent_weights(name), self._training)
            self.cluster_centroids[name] = self._codebooks[name].centroids

    def call(self, inputs: tf.Tensor, training: bool | None = None, **kwargs: Any) -> tf.Tensor:
        if training:
            for name, codebook in self._codebooks.items():
                codebook.step(self._latent_weights(name))
        self.update_clustered_weights_associations(training)
        return self.layer.call(inputs, **kwargs)

    def update_clustered_weights_associations(self, training: bool | None = None) -> None:
        """Gives the wrapped layer its clustered weights; tfmot's `strip_clustering` calls it too.

        Args:
          training: Whether the weights are for a training step.
        """
        for name, codebook in self._codebooks.items():
            quantize = codebook.quantize_in_training if training else codebook.quantize
            weight = tf.reshape(quantize(self._latent_weights(name)), self._arrange(name).shape)
            self.set_weight_to_layer(name, restore_kernel(self.layer, weight) if is_quantizable(self.layer) else weight)

    def strip(self) -> Callable:
        """Makes the replacement of the wrapper in the stripped model, a callable on tensors."""
        self.check_finite()
        self.update_clustered_weights_associations()
        if not is_quantizable(self.layer):
            return self._make_plain_layer()
        ((name, codebook),) = self._codebooks.items()
        layer = make_quantized_layer(self.layer, self._training.cluster_per_channel)
        kernel = arrange_kernel(self.layer, self.get_weight_from_layer(name))
        return fill_on_call(layer, kernel, codebook.scale(), bias_of(self.layer))

    def _make_plain_layer(self):
        """Makes a layer of the user's own class with its clustered weights."""
        plain = type(self.layer).from_config(self.layer.get_config())
        weights = self.layer.get_weights()
        for position, name in sorted(self.position_original_weights.items()):
            weights.insert(position, self.get_weight_from_layer(name).numpy())

        def call(*arguments, **keywords):
            outputs = plain(*arguments, **keywords)
            plain.set_weights(weights)
            return outputs

        return call

    def _latent_weights(self, name):
        """A weight as [rows, output channels]."""
        weight = self._arrange(name)
        return tf.reshape(weight, [-1, weight.shape[-1]])

    def _arrange(self, name):
        """A weight with its output channels last, as those of a user's own layers are."""
        weight = self.original_clusterable_weights[name]
        return arrange_kernel(self.layer, weight) if is_quantizable(self.layer) else tf.convert_to_tensor(weight)

    # Here the wrapper owns the weights of its layer; tfmot trains them even if the layer does not train.
    @property
    def trainable_weights(self) -> list[tf.Variable]:
        """The variables that train: none of the layer's if it does not train."""
        return super().trainable_weights if self.layer.trainable else []

    @property
    def non_trainable_weights(self) -> list[tf.Variable]:
        """All other variables of wrapper and layer."""
        return super().non_trainable_weights + ([] if self.layer.trainable else self._trainable_weights)

    # tfmot's wrapper returns the weights of the wrapped layer, in which the clustered ones are missing.
    get_weights = keras.layers.Layer.get_weights
    set_weights = keras.layers.Layer.set_weights

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | self._training.to_config()
        del config["preserve_sparsity"]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "ClusterQuantize":
        layer = keras.layers.deserialize(config["layer"], custom_objects=custom_objects)
        return cls(**CodebookTraining.arguments_from(config) | {"layer": layer})
