"""tfmot's clustering wrapper with centroids that move during training and lie on the grid of the exported file."""

import tensorflow as tf
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights

from tf_repvgg.quantization.checks import check_finite
from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining, MovingCodebook
from tf_repvgg.quantization.quantized_layers import bias_of, fill_weights, has_quantized_form, quantized_form


class Clustered:
    """What wrappers have in common: `_codebooks`, {name of a weight: its `MovingCodebook`}, and `_latent(name)`."""

    stripped_by = "strip_cluster_quantize"

    def freeze(self, frozen=True):
        """Fixes which centroid each weight has, or lets it change again; in effect at once.

        Frozen, latent weights have no gradient, and what the optimizer's momentum and weight decay do to them has no
        effect. Centroids rest too, unless the optimizer moves them (`train_centroids`).
        """
        for name, codebook in self._codebooks.items():
            codebook.freeze(self._latent(name), frozen)

    def check_finite(self):
        """Raises ValueError if weights or centroids hold infinities or NaN, which codes would hide."""
        for name, codebook in self._codebooks.items():
            check_finite(self.layer, self._latent(name), codebook.centroids)

    def clusters(self):
        """{weight: (latent weights [rows, channels], grid centroids [1 or channels, states], indices)}, to look at.

        The indices, int32 like the weights, say which centroid each weight has.
        """
        latent = {name: self._latent(name) for name in self._codebooks}
        return {
            name: (latent[name], codebook.grid(), codebook.assignments(latent[name]))
            for name, codebook in self._codebooks.items()
        }


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ClusterQuantize(Clustered, ClusterWeights):
    """A layer whose kernel is a few centroids, each an int8 code times a scale, while latent weights train.

    Forward: every latent weight is replaced by its nearest centroid. Backward: straight through to the latent weights.
    In training, every so many steps, centroids move towards the mean of the weights that are nearest to them (a running
    step of Lloyd's algorithm); clusters without weights start anew. The scale follows the largest centroid.

    Args:
      layer: Conv2D, DepthwiseConv2D, Dense, or a `tfmot.clustering.keras.ClusterableLayer`.
      **kwargs: those of `CodebookTraining`, and of a Keras layer. `cluster_per_channel` holds for Dense and
        DepthwiseConv2D too.

    Raises:
      ValueError: for arguments out of range, and layers that cannot be clustered.
    """

    def __init__(self, layer, number_of_clusters, cluster_centroids_init=None, cluster_per_channel=False, **kwargs):
        own = {field: kwargs.pop(field) for field in CodebookTraining.__dataclass_fields__ if field in kwargs}
        self._training = CodebookTraining(number_of_clusters, cluster_centroids_init, cluster_per_channel, **own)
        kwargs.setdefault("dtype", "float32")
        super().__init__(
            layer,
            number_of_clusters,
            cluster_centroids_init=cluster_centroids_init,
            cluster_gradient_aggregation=self._training.cluster_gradient_aggregation,
            **kwargs,
        )
        self.cluster_per_channel = cluster_per_channel  # tfmot's own knows it of Conv2D only
        if has_quantized_form(layer):
            # tfmot leaves depthwise kernels alone, for the accuracy that they lose, and weights that do not train.
            name = "depthwise_kernel" if isinstance(layer, keras.layers.DepthwiseConv2D) else "kernel"
            layer.get_clusterable_weights = lambda: [(name, getattr(layer, name))]
        self._codebooks = {}

    def build(self, input_shape):
        keras.layers.Wrapper.build(self, input_shape)
        self.build_input_shape = input_shape
        for name, weight in self.layer.get_clusterable_weights():
            # tfmot's bookkeeping: in `call` a tensor takes the place of the layer's variable, which stays here.
            self.original_clusterable_weights[name] = weight
            setattr(self, f"original_weight_{name}", weight)
            self.position_original_weights[[id(w) for w in self.layer.weights].index(id(weight))] = name
            self._codebooks[name] = MovingCodebook(self, name, self._latent(name), self._training)
            self.cluster_centroids[name] = self._codebooks[name].centroids

    def call(self, inputs, training=None, **kwargs):
        if training:
            for name, codebook in self._codebooks.items():
                codebook.step(self._latent(name))
        self.update_clustered_weights_associations(training)
        return self.layer.call(inputs, **kwargs)

    def update_clustered_weights_associations(self, training=None):
        """Gives the wrapped layer its clustered weights, as tfmot's `strip_clustering` asks for."""
        for name, codebook in self._codebooks.items():
            found = (codebook.in_training if training else codebook.quantized)(self._latent(name))
            self.set_weight_to_layer(name, tf.reshape(found, self.original_clusterable_weights[name].shape))

    def strip(self):
        """What takes the wrapper's place in the stripped model, as a callable on tensors."""
        self.check_finite()
        self.update_clustered_weights_associations()
        if not has_quantized_form(self.layer):
            return self._plain_layer()
        ((name, codebook),) = self._codebooks.items()
        form = quantized_form(self.layer, self._training.cluster_per_channel)
        return fill_weights(form, self.get_weight_from_layer(name), codebook.scale(), bias_of(self.layer))

    def _plain_layer(self):
        """A layer of the user's own class that holds its clustered weights."""
        plain = type(self.layer).from_config(self.layer.get_config())
        weights = self.layer.get_weights()
        for position, name in sorted(self.position_original_weights.items()):
            weights.insert(position, self.get_weight_from_layer(name).numpy())

        def call(*arguments, **keywords):
            outputs = plain(*arguments, **keywords)
            plain.set_weights(weights)
            return outputs

        return call

    def _latent(self, name):
        """A weight as [rows, output channels]; those of a depthwise kernel are its last two axes."""
        weight = self.original_clusterable_weights[name]
        is_depthwise = isinstance(self.layer, keras.layers.DepthwiseConv2D)
        channels = weight.shape[-2] * weight.shape[-1] if is_depthwise else weight.shape[-1]
        return tf.reshape(weight, [-1, channels])

    # The weights of a layer are the wrapper's own here; tfmot trains them even where the layer does not train.
    @property
    def trainable_weights(self):
        return super().trainable_weights if self.layer.trainable else []

    @property
    def non_trainable_weights(self):
        return super().non_trainable_weights + ([] if self.layer.trainable else self._trainable_weights)

    # tfmot's wrapper has those of the wrapped layer, in which the clustered weights are missing.
    get_weights = keras.layers.Layer.get_weights
    set_weights = keras.layers.Layer.set_weights

    def get_config(self):
        config = super().get_config() | self._training.to_config()
        del config["preserve_sparsity"]
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.layers.deserialize(config["layer"], custom_objects=custom_objects)
        return cls(**CodebookTraining.arguments_from(config) | {"layer": layer})
