"""Small networks with random weights, their training, and comparison with their files."""

import dataclasses

import numpy as np
import tf_keras as keras

from helpers.random_weights import randomize
from tf_repvgg import tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, ReparameterizedBlock, RepVGGBlock
from tf_repvgg.quantization import make_quantized_layer, quantize_activations, quantize_min_max, quantizers

SIZE = (12, 11, 3)


def random_images(count=16, size=SIZE, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *size)).astype("float32")


def small_repvgg(padding="same"):
    """A fused network of a RepVGG block, a QARepVGG block and a Dense layer for 5 classes."""
    inputs = keras.Input(SIZE, name="image")
    features = RepVGGBlock(8, strides=2, padding=padding, name="first")(inputs)
    features = QARepVGGBlock(8, name="second")(features)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(features))
    randomize(model)
    return fuse(model)


def model_of_all_weighted_layers():
    """A Conv2D, a DepthwiseConv2D and a Dense layer, for images of 8 by 8 pixels."""
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.Conv2D(6, 3, activation="relu", use_bias=False, name="conv")(inputs)
    features = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(features)
    features = keras.layers.Flatten()(features)
    return keras.Model(inputs, keras.layers.Dense(4, activation="softmax", name="dense")(features))


def quantize_by_one_step(model, bits=8, per_channel=True, batch=None):
    """Quantizes weights by min-max, and activations with the ranges of one training step."""

    def replace(layer, changes):
        quantized_layer = make_quantized_layer(layer, per_channel, **changes)

        def call(inputs):
            outputs = quantized_layer(inputs)
            kernel = layer.get_weights()[0]
            grouped = kernel.reshape(*kernel.shape[:2], 1, -1) if "depthwise" in layer.weights[0].name else kernel
            quantized_layer.set_weights([*layer.get_weights(), quantized_layer.scale.numpy()])
            quantized_layer.set_quantized_kernel(quantize_min_max(grouped, bits, per_channel))
            return outputs

        return call

    quantized = quantize_activations(model, replace)
    quantized(random_images(size=model.input_shape[1:]) if batch is None else batch, training=True)
    return quantized


def fit(model, epochs=2, learning_rate=0.001, **arguments):
    """Trains a classifier of 5 classes on 16 random images."""
    model.compile(keras.optimizers.SGD(learning_rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(random_images(), np.arange(16) % 5, batch_size=4, epochs=epochs, verbose=0, **arguments)
    return model


def output_step(model):
    """The step of the grid that a quantized model's outputs are on."""
    return quantizers(model)[-1].scale()


def assert_file_computes_the_model(model, file, batch, steps=2.01):
    actual, expected = tflite.predict(file, batch), model(batch).numpy()
    assert np.max(np.abs(actual - expected)) <= steps * output_step(model)
    assert np.ptp(actual) > 20 * output_step(model)


def list_blocks(model):
    """The blocks of a model in training form."""
    return [layer for layer in model.layers if isinstance(layer, ReparameterizedBlock)]


def shrink_variant(variant):
    """An eighth of the channels, a quarter of the depth: the same kinds of blocks in the same order, quickly fused."""
    return dataclasses.replace(
        variant,
        stem_width=variant.stem_width // 8,
        widths=tuple(width // 8 for width in variant.widths),
        depths=tuple(-(-depth // 4) for depth in variant.depths),
        se_reduction=variant.se_reduction and 2,
        se_depths=variant.se_depths and tuple(-(-depth // 4) for depth in variant.se_depths),
    )
