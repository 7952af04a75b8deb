"""Clustered weights in training form: the merged kernel of a multi-branch block, quantized in every step."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining, MovingCodebook
from tf_repvgg.quantization.qat.clustering.wrapper import ClusteringWrapper
from tf_repvgg.quantization.quantized_layers import fill_on_call, make_quantized_layer

BATCH_NORM_STATISTICS = ("frozen", "running")


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ClusterQuantizeBlock(ClusteringWrapper):
    """A block in training form that computes the same as its deploy form with a clustered kernel.

    Kernel and bias are those of `equivalent_kernel_and_bias`, on running statistics. Gradients pass through them to the
    kernels and normalizations of the branches, which are the variables that train. Clusters and centroids are as in
    `ClusterQuantize`.

    Args:
      layer: RepVGGBlock or QARepVGGBlock, without squeeze-and-excite.
      batch_norm_statistics: Treatment of running means and variances. "frozen" leaves them as they are. "running" lets
        them follow the batches until clusters are frozen, for which the branches run in float too.
      **kwargs: Fields of `CodebookTraining`, and keyword arguments of a Keras layer.

    Raises:
      ValueError: If an argument is out of range, or the block has a squeeze-and-excite.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.layers import RepVGGBlock
      >>> from tf_repvgg.quantization.qat.clustering import ClusterQuantizeBlock
      >>> block = ClusterQuantizeBlock(RepVGGBlock(4, name="block"), number_of_clusters=6)
      >>> outputs = block(np.ones([1, 8, 8, 3], np.float32))
      >>> weights, centroids, indices = block.clusters()["kernel"]
      >>> block.name, weights.shape, centroids.shape
      ('cluster_block', TensorShape([27, 4]), TensorShape([1, 6]))
    """

    def __init__(self, layer: ReparameterizedBlock, batch_norm_statistics: str = "frozen", **kwargs: Any) -> None:
        settings = {field: kwargs.pop(field) for field in CodebookTraining.__dataclass_fields__ if field in kwargs}
        kwargs.setdefault("name", f"cluster_{layer.name}")
        kwargs.setdefault("dtype", "float32")
        super().__init__(layer, **kwargs)
        if batch_norm_statistics not in BATCH_NORM_STATISTICS:
            raise ValueError(
                f"batch_norm_statistics is {batch_norm_statistics!r}; known: {', '.join(BATCH_NORM_STATISTICS)}"
            )
        if layer.se_reduction is not None:
            raise ValueError(
                f"block {layer.name!r} has a squeeze-and-excite, which is quantized in deploy form only; call "
                "tf_repvgg.fusion.fuse(model) first"
            )
        self.batch_norm_statistics = batch_norm_statistics
        self._training = CodebookTraining(**settings)
        self._codebooks = {}

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.layer(keras.Input(input_shape[1:]))  # only a call gives the layers inside of the block their weights
        weights = self._latent_weights("kernel")
        self._codebooks["kernel"] = MovingCodebook(self, "kernel", weights, self._training)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        kernel, bias = self.layer.equivalent_kernel_and_bias()
        codebook, latent_weights = self._codebooks["kernel"], _as_matrix(kernel)
        quantize = codebook.quantize
        if training:
            if self.batch_norm_statistics == "running":
                tf.cond(codebook.is_frozen, lambda: None, lambda: self._update_statistics(inputs))
            codebook.step(latent_weights)
            quantize = codebook.quantize_in_training
        return self.layer.call_merged(inputs, tf.reshape(quantize(latent_weights), kernel.shape), bias)

    def _update_statistics(self, inputs):
        self.layer(inputs, training=True)  # its outputs are not used

    def strip(self) -> Callable:
        """Makes the replacement of the wrapper in the stripped model, a callable on tensors."""
        self.check_finite()
        _, bias = self.layer.equivalent_kernel_and_bias()
        codebook = self._codebooks["kernel"]
        layer = make_quantized_layer(self.layer.make_merged_convolution(), self._training.cluster_per_channel)
        convolution = fill_on_call(layer, codebook.quantize(self._latent_weights("kernel")), codebook.scale(), bias)
        padding = self.layer.make_deploy_padding()
        return lambda inputs, **_: convolution(inputs if padding is None else padding(inputs))

    def _latent_weights(self, name):
        kernel, _ = self.layer.equivalent_kernel_and_bias()
        return _as_matrix(kernel)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        statistics = {"batch_norm_statistics": self.batch_norm_statistics}
        return super().get_config() | self._training.to_config() | statistics

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "ClusterQuantizeBlock":
        layer = keras.layers.deserialize(config["layer"], custom_objects=custom_objects)
        return cls(**CodebookTraining.arguments_from(config) | {"layer": layer})


def _as_matrix(kernel):
    return tf.reshape(kernel, [-1, kernel.shape[-1]])
