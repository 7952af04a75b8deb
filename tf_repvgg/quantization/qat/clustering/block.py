"""Clustered weights in training form: the merged kernel of a multi-branch block, quantized where it is computed."""

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.quantization.qat.clustering.moving_codebook import CodebookTraining, MovingCodebook
from tf_repvgg.quantization.qat.clustering.wrapper import Clustered
from tf_repvgg.quantization.quantized_layers import fill_weights, quantized_form

BATCH_NORM_STATISTICS = ("frozen", "running")


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ClusterQuantizeBlock(Clustered, keras.layers.Wrapper):
    """A block in training form that computes as its deploy form with a clustered kernel would.

    Kernel and bias are those of `equivalent_kernel_and_bias`, on running statistics; gradients go through them to the
    branches' kernels and normalizations, which are what trains. All else is as in `ClusterQuantize`.

    Args:
      layer: RepVGGBlock or QARepVGGBlock, without squeeze-and-excite.
      batch_norm_statistics: "frozen" leaves running means and variances as they are; "running" lets them follow the
        batches until clusters are frozen, for which the branches are run in float too.
      **kwargs: those of `CodebookTraining`, and of a Keras layer.

    Raises:
      ValueError: for arguments out of range, and blocks with squeeze-and-excite.
    """

    def __init__(self, layer, batch_norm_statistics="frozen", **kwargs):
        own = {field: kwargs.pop(field) for field in CodebookTraining.__dataclass_fields__ if field in kwargs}
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
        self._training = CodebookTraining(**own)
        self._codebooks = {}

    def build(self, input_shape):
        super().build(input_shape)
        self.layer(keras.Input(input_shape[1:]))  # only then do the layers inside of it have weights
        self._codebooks["kernel"] = MovingCodebook(self, "kernel", self._latent("kernel"), self._training)

    def call(self, inputs, training=None):
        kernel, bias = self.layer.equivalent_kernel_and_bias()
        codebook, latent = self._codebooks["kernel"], _as_matrix(kernel)
        quantized = codebook.quantized
        if training:
            if self.batch_norm_statistics == "running":
                tf.cond(codebook.is_frozen, lambda: None, lambda: self._follow(inputs))
            codebook.step(latent)
            quantized = codebook.in_training
        return self.layer.merged_call(inputs, tf.reshape(quantized(latent), kernel.shape), bias)

    def _follow(self, inputs):
        self.layer(inputs, training=True)  # for the statistics that it updates

    def strip(self):
        """What takes the wrapper's place in the stripped model, as a callable on tensors."""
        self.check_finite()
        _, bias = self.layer.equivalent_kernel_and_bias()
        codebook = self._codebooks["kernel"]
        form = quantized_form(self.layer.merged_convolution(), self._training.cluster_per_channel)
        convolution = fill_weights(form, codebook.quantized(self._latent("kernel")), codebook.scale(), bias)
        padding = self.layer.deploy_padding()
        return lambda inputs, **_: convolution(inputs if padding is None else padding(inputs))

    def _latent(self, name):
        kernel, _ = self.layer.equivalent_kernel_and_bias()
        return _as_matrix(kernel)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        own = {"batch_norm_statistics": self.batch_norm_statistics}
        return super().get_config() | self._training.to_config() | own

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.layers.deserialize(config["layer"], custom_objects=custom_objects)
        return cls(**CodebookTraining.arguments_from(config) | {"layer": layer})


def _as_matrix(kernel):
    return tf.reshape(kernel, [-1, kernel.shape[-1]])
