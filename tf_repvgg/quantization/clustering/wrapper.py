"""tfmot's clustering wrapper with centroids that move during training and lie on the grid of the exported file."""

import tensorflow as tf
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import (
    CentroidInitialization,
    GradientAggregation,
)
from tensorflow_model_optimization.python.core.clustering.keras.cluster_wrapper import ClusterWeights

from tf_repvgg.quantization.clustering import codebooks
from tf_repvgg.quantization.layers import bias_of, has_quantized_form, quantized_form
from tf_repvgg.quantization.uniform import QuantizedKernel

_AGGREGATIONS = {GradientAggregation.SUM: "sum", GradientAggregation.AVG: "mean"}


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ClusterQuantize(ClusterWeights):
    """A layer whose kernel is a few centroids, each an int8 code times a scale, while latent weights train.

    Forward: every latent weight is replaced by its nearest centroid. Backward: straight through to the latent weights.
    In training, every so many steps, centroids move towards the mean of the weights that are nearest to them (a running
    step of Lloyd's algorithm); clusters without weights start anew. The scale follows the largest centroid.

    Args:
      layer: Conv2D, DepthwiseConv2D, Dense, or a `tfmot.clustering.keras.ClusterableLayer`.
      number_of_clusters: 2 to 256.
      cluster_centroids_init: None for k-means, or a `tfmot.clustering.keras.CentroidInitialization`.
      cluster_per_channel: a codebook for each output channel, or one; of Dense and DepthwiseConv2D too.
      cluster_gradient_aggregation: tfmot's `GradientAggregation`, with train_centroids.
      centroid_update_rate: share of the way to the mean that a centroid moves, 0 (not at all) to 1.
      centroid_update_steps: training steps from one such move to the next.
      train_centroids: whether the optimizer moves centroids too, by tfmot's gradient.

    Raises:
      ValueError: for arguments out of range, and layers that cannot be clustered.
    """

    def __init__(
        self,
        layer,
        number_of_clusters,
        cluster_centroids_init=None,
        cluster_per_channel=False,
        cluster_gradient_aggregation=GradientAggregation.SUM,
        centroid_update_rate=0.1,
        centroid_update_steps=10,
        train_centroids=False,
        **kwargs,
    ):
        if not 2 <= number_of_clusters <= 256:
            raise ValueError(f"number_of_clusters is {number_of_clusters!r}; it must be from 2 to 256")
        if not 0 <= centroid_update_rate <= 1:
            raise ValueError(f"centroid_update_rate is {centroid_update_rate!r}; it must be from 0 to 1")
        if not (isinstance(centroid_update_steps, int) and centroid_update_steps > 0):
            raise ValueError(f"centroid_update_steps is {centroid_update_steps!r}; it must be a whole number above 0")
        super().__init__(
            layer,
            number_of_clusters,
            cluster_centroids_init=cluster_centroids_init,
            cluster_gradient_aggregation=cluster_gradient_aggregation,
            **kwargs,
        )
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            # tfmot leaves depthwise kernels alone, for the accuracy that they lose.
            layer.get_clusterable_weights = lambda: [("depthwise_kernel", layer.depthwise_kernel)]
        self.cluster_per_channel = cluster_per_channel
        self.centroid_update_rate = centroid_update_rate
        self.centroid_update_steps = centroid_update_steps
        self.train_centroids = train_centroids
        self._assignments = {}

    def build(self, input_shape):
        keras.layers.Wrapper.build(self, input_shape)
        self.build_input_shape = input_shape
        self._steps = self.add_weight("steps", [], tf.int64, keras.initializers.Zeros(), trainable=False)
        self._is_frozen = self.add_weight("is_frozen", [], tf.bool, keras.initializers.Zeros(), trainable=False)
        for name, weight in self.layer.get_clusterable_weights():
            if not bool(tf.reduce_all(tf.math.is_finite(weight))):
                raise ValueError(f"layer {self.layer.name!r} holds infinities or NaN; was training stable?")
            # tfmot's bookkeeping: in `call` a tensor takes the place of the layer's variable, which stays here.
            self.original_clusterable_weights[name] = weight
            setattr(self, f"original_weight_{name}", weight)
            self.position_original_weights[[id(w) for w in self.layer.weights].index(id(weight))] = name
            centroids = codebooks.initial_centroids(
                self._as_matrix(weight), self.number_of_clusters, self.cluster_per_channel, self.cluster_centroids_init
            )
            self.cluster_centroids[name] = self.add_weight(
                f"cluster_centroids_{name}",
                centroids.shape,
                tf.float32,
                keras.initializers.Constant(centroids.numpy()),
                trainable=self.train_centroids,
            )
            # What weights are frozen to; a byte each.
            self._assignments[name] = self.add_weight(
                f"assignments_{name}", weight.shape, tf.uint8, keras.initializers.Zeros(), trainable=False
            )

    def call(self, inputs, training=None, **kwargs):
        if training:
            self._update_centroids()
        self.update_clustered_weights_associations()
        return self.layer.call(inputs, **kwargs)

    def update_clustered_weights_associations(self):
        """Gives the wrapped layer its clustered weights, as tfmot's `strip_clustering` asks for."""
        for name, weight in self.original_clusterable_weights.items():
            self.set_weight_to_layer(name, self._clustered(name, weight))

    def freeze(self, frozen=True):
        """Fixes which centroid each weight has, and where centroids are; or lets all move again. In effect at once.

        Frozen, latent weights do not train; with `train_centroids` the optimizer still moves centroids.
        """
        for name, weight in self.original_clusterable_weights.items():
            if frozen and not self._is_frozen.numpy():
                indices = codebooks.assign(self._as_matrix(weight), self._on_grid(name))
                self._assignments[name].assign(tf.cast(tf.reshape(indices, weight.shape), tf.uint8))
        self._is_frozen.assign(frozen)

    def clusters(self):
        """{weight: (latent weights [rows, channels], grid centroids [1 or channels, states])}, to look at."""
        return {
            name: (self._as_matrix(weight), self._on_grid(name))
            for name, weight in self.original_clusterable_weights.items()
        }

    def stripped(self):
        """What takes the wrapper's place in the stripped model, as a callable on tensors."""
        self.update_clustered_weights_associations()
        if not has_quantized_form(self.layer):
            return self._plain_layer()
        ((name, _),) = self.original_clusterable_weights.items()
        kernel = self._as_matrix(self.get_weight_from_layer(name)).numpy()
        scale = codebooks.grid_scale(self.cluster_centroids[name]).numpy()
        form = quantized_form(self.layer, self.cluster_per_channel)
        bias = bias_of(self.layer)

        def call(*arguments, **keywords):
            outputs = form(*arguments, **keywords)
            codes = (kernel / scale).round().astype("int8").reshape(form.codes_shape)
            form.set_quantized_kernel(QuantizedKernel(codes, scale))
            if form.use_bias:
                form.bias.assign(bias)
            return outputs

        return call

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

    def _clustered(self, name, weight):
        aggregation = _AGGREGATIONS[self.cluster_gradient_aggregation] if self.train_centroids else None
        found = codebooks.quantize(
            self._as_matrix(weight),
            self._on_grid(name),
            tf.convert_to_tensor(self._is_frozen),
            self._as_matrix(self._assignments[name]),
            aggregation,
        )
        return tf.reshape(found, weight.shape)

    def _on_grid(self, name):
        # The optimizer may have moved one centroid past another.
        return codebooks.on_grid(tf.sort(self.cluster_centroids[name], axis=-1))

    def _update_centroids(self):
        self._steps.assign_add(1)
        is_due = (self._steps % self.centroid_update_steps == 0) & ~tf.convert_to_tensor(self._is_frozen)
        if self.centroid_update_rate:
            tf.cond(is_due, self._move_centroids, lambda: None)

    def _move_centroids(self):
        for name, weight in self.original_clusterable_weights.items():
            centroids = self.cluster_centroids[name]
            moved = codebooks.lloyd_step(
                self._as_matrix(weight), tf.convert_to_tensor(centroids), self.centroid_update_rate
            )
            centroids.assign(moved)

    def _as_matrix(self, weight):
        """A weight as [rows, output channels]; those of a depthwise kernel are its last two axes."""
        is_depthwise = isinstance(self.layer, keras.layers.DepthwiseConv2D)
        channels = weight.shape[-2] * weight.shape[-1] if is_depthwise else weight.shape[-1]
        return tf.reshape(weight, [-1, channels])

    # tfmot's wrapper has those of the wrapped layer, in which the clustered weights are missing.
    get_weights = keras.layers.Layer.get_weights
    set_weights = keras.layers.Layer.set_weights

    def get_config(self):
        config = super().get_config()
        del config["preserve_sparsity"]
        initialization = self.cluster_centroids_init
        return {
            **config,
            "cluster_centroids_init": initialization and initialization.value,
            "cluster_gradient_aggregation": self.cluster_gradient_aggregation.value,
            "centroid_update_rate": self.centroid_update_rate,
            "centroid_update_steps": self.centroid_update_steps,
            "train_centroids": self.train_centroids,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        initialization = config["cluster_centroids_init"]
        return cls(
            **config
            | {
                "layer": keras.layers.deserialize(config["layer"], custom_objects=custom_objects),
                "cluster_centroids_init": initialization and CentroidInitialization(initialization),
                "cluster_gradient_aggregation": GradientAggregation(config["cluster_gradient_aggregation"]),
            }
        )
