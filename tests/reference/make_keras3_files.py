"""Writes the files in tests/reference/keras3/: models of Keras 3 as it saves them, images, and its outputs for them.

    TF_USE_LEGACY_KERAS=0 python tests/reference/make_keras3_files.py

Needs keras==3.15.1, which comes with TensorFlow. Weights and running statistics are random. Models whose name begins
with "refused_" are those that tf_repvgg does not read.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

FOLDER = Path(__file__).parent / "keras3"
SHAPE = (9, 12, 4)


@keras.saving.register_keras_serializable("user")
class Doubled(layers.Layer):
    def call(self, inputs):
        return 2 * inputs


@keras.saving.register_keras_serializable("user")
class OwnModel(keras.Model):
    def call(self, inputs):
        return 2 * inputs


def chain(shape, *functions):
    inputs = outputs = keras.Input(shape)
    for function in functions:
        outputs = function(outputs)
    return keras.Model(inputs, outputs)


def make_convolutions():
    return chain(
        SHAPE,
        layers.Rescaling([1.0, 2.0, 0.5, 1.0], offset=-0.5),
        layers.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 0.5, 1.0]),
        layers.Conv2D(8, 3, padding="same", groups=2, activation="hard_silu"),
        layers.BatchNormalization(epsilon=1e-2, scale=False),
        layers.SeparableConv2D(6, 3, depth_multiplier=2, activation="leaky_relu"),
        layers.LeakyReLU(),
        layers.Conv2DTranspose(5, 3, strides=2, padding="same", activation="hard_sigmoid"),
        layers.DepthwiseConv2D((3, 2), dilation_rate=2, activation=keras.activations.relu6),
        layers.PReLU(shared_axes=[1, 2]),
        layers.Conv2D(4, 1, use_bias=False, activation=layers.ReLU(max_value=2.0, negative_slope=0.1)),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.AveragePooling2D(3, strides=2, padding="same"),
        layers.BatchNormalization(axis=2, center=False, trainable=False),
        layers.GlobalMaxPooling2D(keepdims=True),
        layers.Flatten(),
        layers.Dense(6, activation="gelu"),
        layers.Softmax(),
    )


def make_sequences():
    return chain(
        (11, 4),
        layers.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="silu"),
        layers.SpatialDropout1D(0.1),
        layers.ZeroPadding1D(1),
        layers.MaxPooling1D(2),
        layers.Conv1DTranspose(5, 3, strides=2),
        layers.GlobalAveragePooling1D(),
    )


def make_operations():
    first, second = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
    x = ops.relu(first * np.array([1.0, 2.0, 3.0], "float32") + second) - 0.5
    x = ops.concatenate([x / 3.0, 1.0 - second, keras.activations.relu(-first, max_value=6.0)], axis=-1)
    x = layers.Maximum()([x, ops.hard_sigmoid(x)])
    return keras.Model([first, second], [ops.mean(x, axis=(1, 2)), layers.Average()([first, second])])


def make_nested():
    """As for transfer learning, with a layer and a model that are called twice."""
    base = chain(SHAPE, layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(), layers.ReLU(6.0))
    base.trainable = False
    inputs = keras.Input(SHAPE)
    twice = layers.Conv2D(4, 1)
    x = keras.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)])(inputs)
    x = base(layers.Add()([base(x, training=False), twice(twice(x))]), training=False)
    x = keras.Sequential([layers.Conv2D(3, 3, strides=2), layers.GlobalAveragePooling2D()])(x)
    return keras.Model(inputs, layers.Dense(6)(layers.Dropout(0.2)(x)))


def make_classifier():
    """Sequential, compiled and trained for a step, so that its file has the state of an optimizer."""
    model = keras.Sequential(
        [
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.zeros((2, 16, 16, 3)), np.zeros((2, 10)), verbose=0)
    return model


def make_half_precision():
    """Weights of type bfloat16."""
    keras.config.set_dtype_policy("bfloat16")
    model = chain(SHAPE, layers.Flatten(), layers.Dense(2))
    keras.config.set_dtype_policy("float32")
    return model


def make_quantized():
    model = chain((8,), layers.Dense(4))
    model.quantize("int8")
    return model


def make_dictionary():
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, {"logits": layers.Flatten()(inputs)})


MODELS = {
    "convolutions": make_convolutions,
    "sequences": make_sequences,
    "operations": make_operations,
    "nested": make_nested,
    "classifier": make_classifier,
    "half_precision": make_half_precision,
    "refused_lambda": lambda: chain(SHAPE, layers.Lambda(lambda inputs: 2 * inputs, name="double")),
    "refused_own_layer": lambda: chain(SHAPE, Doubled(name="double")),
    "refused_own_model": lambda: OwnModel(name="own"),
    "refused_recurrent": lambda: chain((4, 3), layers.LSTM(2, name="memory")),
    "refused_operation": lambda: chain(SHAPE, ops.cumsum),
    "refused_activation": lambda: chain(SHAPE, layers.Conv2D(2, 1, activation="celu", name="conv")),
    "refused_training": lambda: chain(SHAPE, lambda x: layers.BatchNormalization(name="norm")(x, training=True)),
    "refused_channels_first": lambda: chain(SHAPE, layers.MaxPooling2D(2, data_format="channels_first", name="pool")),
    "refused_quantized": make_quantized,
    "refused_dictionary": make_dictionary,
}


def randomize(model, generator):
    for weight in model.weights:
        if weight.dtype in ("float32", "bfloat16"):
            values = generator.normal(0, 0.5, weight.shape)
            weight.assign(np.abs(values) + 0.1 if "variance" in weight.path else values)


def main():
    FOLDER.mkdir(exist_ok=True)
    arrays = {}
    for name, make in MODELS.items():
        keras.utils.set_random_seed(0)
        keras.backend.clear_session()
        generator = np.random.default_rng(0)
        model = make()
        if not name.startswith("refused_"):
            randomize(model, generator)
            images = [generator.normal(size=(2, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
            outputs = model(images if len(images) > 1 else images[0], training=False)
            arrays |= {f"{name}/input{index}": image for index, image in enumerate(images)}
            for index, output in enumerate(outputs if isinstance(outputs, list) else [outputs]):
                arrays[f"{name}/output{index}"] = np.asarray(ops.cast(output, "float32"))
        model.save(FOLDER / f"{name}.keras")
    np.savez_compressed(FOLDER / "results.npz", **arrays)


if __name__ == "__main__":
    main()
