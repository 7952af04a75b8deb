"""Networks and images for tests of post-training quantization."""

import tf_keras as keras

from helpers.networks import SIZE, random_images
from helpers.random_weights import randomize
from tf_repvgg import graph
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.ptq import Network, Options


def smooth_images(count=32):
    """Neighbouring pixels alike, as in photographs: on white noise, the nearest codes are already the best."""
    coarse = random_images(count, (3, 3, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :, :11] + 0.1 * random_images(count, seed=1)


def network_of(model, bits=3, per_channel=False, batch=None, **options):
    batch = random_images(32, model.input_shape[1:]) if batch is None else batch
    return Network(model, batch, ptq.bits_by_layer(model, bits), per_channel, Options(**options))


def build_measured_repvgg(block=RepVGGBlock):
    """A fused model whose normalizations hold the statistics of `random_images(64)`, as after training."""
    inputs = keras.Input(SIZE, name="image")
    features = block(8, strides=2, name="second")(block(8, name="first")(inputs))
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(features))
    randomize(model, dead_share=0)
    for layer in graph.find_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(random_images(64), training=True)
    return fuse(model)


def kernels_of(model):
    return {name: model.get_layer(name).get_quantized_kernel() for name in ("first", "second", "logits")}
