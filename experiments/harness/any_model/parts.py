"""The parts of random models: each is a function from a source of decisions and a feature map to a feature map.

Feature maps are Keras tensors [batch, height, width, channels]. A part that needs a larger map, or a smaller one,
returns the map as it is.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras as keras

from harness.any_model.drawing import Drawing
from tf_repvgg.layers import OutlierAwareBatchNormalization, QARepVGGBlock, RepVGGBlock

Part = Callable[[Drawing, Any], Any]
L = keras.layers

# Maps grow and shrink between these sides.
_SMALLEST, _LARGEST = 4, 12


@keras.saving.register_keras_serializable(package="any_model")
class ChannelOffset(keras.layers.Layer):
    """A layer of a user's own: adds a learned number to each channel."""

    def build(self, input_shape: Any) -> None:
        self.offset = self.add_weight("offset", [input_shape[-1]], initializer=keras.initializers.RandomNormal(0, 1))
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs + self.offset


def make_conv(filters: int = 6, kernel: int = 3, **options: Any) -> keras.layers.Layer:
    """A convolution that keeps height and width."""
    return L.Conv2D(filters, kernel, padding="same", **options)


def _is_large(x, side=_SMALLEST):
    return min(x.shape[1:3]) >= side


def _is_small(x):
    return max(x.shape[1:3]) <= _LARGEST


def add_conv(draw: Drawing, x: Any) -> Any:
    """A convolution of any size, stride, dilation, padding and number of groups."""
    channels = x.shape[-1]
    groups = draw.choose([1, 1, 1, channels if channels % 2 == 0 else 1])
    filters = draw.choose([4, 6, 8]) if groups == 1 else channels * draw.choose([1, 2])
    strides = draw.choose([1, 1, 2]) if _is_large(x) else 1
    return L.Conv2D(
        filters,
        draw.choose([1, 2, 3, (3, 1)]),
        strides,
        draw.choose(["same", "valid"]) if _is_large(x, 7) else "same",
        dilation_rate=draw.choose([1, 1, 2]) if strides == 1 else 1,
        groups=groups,
        use_bias=draw.decide(0.7),
        activation=draw.choose_activation(),
    )(x)


def add_depthwise(draw: Drawing, x: Any) -> Any:
    """A depthwise convolution."""
    strides = draw.choose([1, 1, 2]) if _is_large(x) else 1
    multiplier = draw.choose([1, 1, 2])
    options = {"depth_multiplier": multiplier, "use_bias": draw.decide(0.7), "activation": draw.choose_activation()}
    return L.DepthwiseConv2D(3, strides, "same", **options)(x)


def add_transposed(draw: Drawing, x: Any) -> Any:
    """A transposed convolution."""
    if not _is_small(x):
        return x
    kernel, strides, padding = draw.choose([2, 3]), draw.choose([1, 2]), draw.choose(["same", "valid"])
    return L.Conv2DTranspose(4, kernel, strides, padding, activation=draw.choose_activation())(x)


def add_repvgg(draw: Drawing, x: Any) -> Any:
    """A RepVGG block in training form, with or without identity branch, squeeze-and-excite and OABN."""
    strides = draw.choose([1, 2]) if _is_large(x) else 1
    return RepVGGBlock(
        draw.choose([4, x.shape[-1]]),
        strides=strides,
        padding=draw.choose(["same", "symmetric"]),
        activation=draw.choose_activation(),
    )(x)


def add_shared_conv(draw: Drawing, x: Any) -> Any:
    """One convolution that is called twice."""
    conv = make_conv(x.shape[-1], activation=draw.choose_activation())
    return conv(conv(x))


def add_nested(draw: Drawing, x: Any) -> Any:
    """A model in the model, called once or, if it keeps the number of channels, twice."""
    inner = keras.Input(x.shape[1:])
    nested = keras.Model(inner, add_activation(draw, make_conv(draw.choose([4, x.shape[-1]]))(inner)))
    outputs = nested(x)
    return nested(outputs) if outputs.shape == x.shape and draw.decide(0.3) else outputs


def add_activation(draw: Drawing, x: Any) -> Any:
    """An activation as a layer."""
    return L.Activation(draw.choose_activation())(x)


def add_residual(draw: Drawing, x: Any) -> Any:
    """A branch that is joined with the map that it comes from."""
    y = make_conv(x.shape[-1], activation=draw.choose_activation())(x)
    join = draw.choose(
        [
            lambda: L.Add()([x, y]),
            lambda: x + y,
            lambda: L.Concatenate()([x, y]),
            lambda: L.Multiply()([x, y]),
            lambda: x * y,
            lambda: L.Average()([x, y]),
            lambda: L.Maximum()([x, y]),
            lambda: L.Minimum()([x, y]),
            lambda: L.Subtract()([x, y]),
            lambda: x - y,
            lambda: tf.concat([x, y], -1),
            lambda: x + y * 0.5,
        ]
    )
    return join()


def add_three_branches(draw: Drawing, x: Any) -> Any:
    """Branches of several kernel sizes, as in Inception."""
    branches = [make_conv(3, 1, activation="relu")(x), make_conv(2, 3, activation="relu")(x), L.ReLU()(x)]
    return L.Concatenate()(branches)


def add_squeeze_excite(draw: Drawing, x: Any) -> Any:
    """Channels that are weighed by what their means say."""
    y = L.GlobalAveragePooling2D(keepdims=True)(x)
    y = L.Conv2D(x.shape[-1], 1, activation=draw.choose(["sigmoid", "hard_sigmoid"]))(y)
    return L.Multiply()([x, y])


def add_leaky(draw: Drawing, x: Any) -> Any:
    """A kind of ReLU with parameters of its own."""
    layer = draw.choose(
        [
            L.LeakyReLU(0.2),
            L.ReLU(negative_slope=0.1),
            L.ReLU(threshold=0.3),
            L.ELU(),
            L.PReLU(shared_axes=[1, 2], alpha_initializer="uniform"),
        ]
    )
    return layer(x)


def add_pooling(draw: Drawing, x: Any) -> Any:
    """Pooling of two by two."""
    pooling, padding = draw.choose([L.MaxPooling2D, L.AveragePooling2D]), draw.choose(["same", "valid"])
    return pooling(2, padding=padding)(x) if _is_large(x) else x


def add_upsampling(draw: Drawing, x: Any) -> Any:
    """A map of twice the size."""
    interpolation = draw.choose(["nearest", "bilinear"])
    return L.UpSampling2D(2, interpolation=interpolation)(x) if _is_small(x) and not _is_large(x, 7) else x


def add_function(draw: Drawing, x: Any) -> Any:
    """A function of TensorFlow on a tensor."""
    functions = (tf.nn.relu, tf.nn.relu6, tf.abs, tf.square, tf.nn.leaky_relu, tf.sigmoid, tf.tanh, tf.exp)
    return draw.choose(functions)(x)


def add_slices(draw: Drawing, x: Any) -> Any:
    """A part of the map, by an index, by a split, or by a crop."""
    if not _is_large(x, 6):
        return x
    half = x.shape[-1] // 2
    return draw.choose(
        [
            lambda: x[:, 1:, :, :],
            lambda: tf.concat([x[..., half:], x[..., :half]], -1),
            lambda: L.Cropping2D(1)(x),
            lambda: x[:, ::2, ::2],
        ]
    )()


def add_padding(draw: Drawing, x: Any) -> Any:
    """Zeros around the map."""
    if not _is_small(x):
        return x
    return draw.choose([L.ZeroPadding2D(1), lambda tensor: tf.pad(tensor, [[0, 0], [1, 0], [0, 1], [0, 0]])])(x)


def add_mixed_channels(draw: Drawing, x: Any) -> Any:
    """A Dense layer on the channels of every pixel."""
    return L.Dense(5, activation=draw.choose(["relu", None]))(x)


def add_operator(draw: Drawing, x: Any) -> Any:
    """An operator with a constant."""
    constant = draw.draw_constant(x.shape[-1])
    return draw.choose([lambda: x + constant, lambda: x - constant, lambda: x * constant, lambda: x / constant])()


def _add_norm(draw, x):
    return L.BatchNormalization()(x)


PARTS: dict[str, Part] = {
    "activation": add_activation,
    "branches": add_three_branches,
    "channel offset": lambda draw, x: ChannelOffset()(x),
    "conv": add_conv,
    "conv and activation": lambda draw, x: add_activation(draw, add_conv(draw, x)),
    "conv and dropout and norm": lambda draw, x: _add_norm(draw, L.Dropout(0.3)(L.Conv2D(6, 1)(x))),
    "conv and norm and relu": lambda draw, x: L.ReLU()(_add_norm(draw, make_conv(use_bias=False)(x))),
    "conv and offset layer": lambda draw, x: ChannelOffset()(make_conv()(x)),
    "conv and operator": lambda draw, x: add_operator(draw, make_conv()(x)),
    "conv and two norms": lambda draw, x: _add_norm(draw, _add_norm(draw, make_conv()(x))),
    "conv and OABN": lambda draw, x: OutlierAwareBatchNormalization()(make_conv(4)(x)),
    "dense on pixels": add_mixed_channels,
    "depthwise": add_depthwise,
    "dropout": lambda draw, x: L.Dropout(0.2)(x),
    "function": add_function,
    "hard swish": lambda draw, x: x * (tf.nn.relu6(x + 3.0) * (1.0 / 6.0)),
    "kinds of ReLU": add_leaky,
    "minus mean": lambda draw, x: x - tf.reduce_mean(x, [1, 2], keepdims=True),
    "nested": add_nested,
    "norm": _add_norm,
    "operator": add_operator,
    "padding": add_padding,
    "permute": lambda draw, x: L.Permute((2, 1, 3))(x),
    "pooling": add_pooling,
    "QARepVGG": lambda draw, x: QARepVGGBlock(x.shape[-1])(x),
    "relu": lambda draw, x: L.ReLU(draw.choose([None, 6.0, 1.0]))(x),
    "RepVGG": add_repvgg,
    "rescaling": lambda draw, x: L.Rescaling(float(draw.generator.uniform(0.3, 3)), draw.choose([0.0, 0.7]))(x),
    "residual": add_residual,
    "separable": lambda draw, x: L.SeparableConv2D(6, 3, padding="same", activation=draw.choose_activation())(x),
    "shared conv": add_shared_conv,
    "slices": add_slices,
    "squeeze and excite": add_squeeze_excite,
    "transposed": add_transposed,
    "upsampling": add_upsampling,
}
