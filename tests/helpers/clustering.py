"""Models for tests of ClusterQAT, and a look inside of clustered models."""

import numpy as np
import tf_keras as keras

from helpers.networks import SIZE, random_images
from tf_repvgg.quantization.qat.clustering import ClusterQuantize


def wrappers_by_layer(model):
    return {layer.layer.name: layer for layer in model.layers if isinstance(layer, ClusterQuantize)}


def read_clustered_kernels(model):
    model(random_images())  # after training, the layers hold tensors of its graph
    return [wrapper.layer.kernel.numpy() for wrapper in wrappers_by_layer(model).values()]


def count_clusters(codes, per_channel):
    """The number of distinct codes in the kernel, or in the channel that has most."""
    columns = codes.reshape(-1, codes.shape[-1]).T if per_channel else [codes]
    return max(len(np.unique(column)) for column in columns)


def model_in_training_form(block, **options):
    """A strided block, a block with all its branches, and a head, with statistics of a few batches."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SIZE)
    features = block(6, strides=2, name="first", **options)(inputs)
    features = block(6, name="second", **options)(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(keras.layers.GlobalAveragePooling2D()(features)))
    for _ in range(3):
        model(random_images(), training=True)
    return model
