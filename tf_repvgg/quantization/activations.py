"""Activations on integer grids in a Keras model, where and as an integer TFLite file has them."""

import collections
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS
from tf_repvgg.quantization.shared_graphs import shared_graph

ACTIVATION_BITS = (8, 16)
# Ranges that TFLite prescribes for the outputs of these activations in 8 bits; in 16, one for all.
FIXED_RANGES = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
_FIXED_RANGE_16 = (-32767 / 32768, 32767 / 32768)

_FUSED_ACTIVATIONS = ("linear", "relu", "relu6")
# A range narrower than the first is that of an activation that is always zero; runtimes refuse scales that small.
_DEAD_WIDTH, _NOMINAL_WIDTH = 1e-5, 255 / 128
_LARGEST_16_BIT_CODE = 32767
# TFLite gives the outputs of these the scale of their input; a grid of their own would not convert.
_RANGE_PRESERVING = (
    keras.layers.AveragePooling2D,
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GaussianNoise,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling2D,
    keras.layers.Permute,
    keras.layers.Reshape,
    keras.layers.SpatialDropout2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)


@keras.saving.register_keras_serializable(package="tf_repvgg")
class ActivationQuantizer(keras.layers.Layer):
    """Fake quantization of activations to 8 or 16 bits, one range per tensor, as TFLite computes it.

    Forward: with [minimum, maximum] moved by less than half a step so that zero is a code,
    `scale * round(clip(x) / scale)`, rounding ties up. Of 16 bits the range is symmetric around zero. Pseudo-gradient:
    1 inside the range, 0 outside. In a graph that trains, it goes around a ReLU just before, to the ReLU's input; to
    its output this layer then has no gradient.
    In training the range follows that of the batches, which the same step already uses:
    `range = momentum * range + (1 - momentum) * range of the batch`; the first batch sets it.

    A range that was neither trained nor set is NaN, and so is then every output.

    Args:
      momentum: of the running range, 0 to 1.
      fixed_range: (minimum, maximum) that never changes, for activations whose range TFLite prescribes.
      nonnegative: that inputs are known to be zero or above, as after ReLU; saves a pass over them.
      bits: 8 or 16.

    Raises:
      ValueError: for a momentum outside 0..1, other bits, or a fixed range that does not hold zero.

    References: arXiv:1712.05877 (section 3 and 3.1).
    """

    def __init__(self, momentum=0.99, fixed_range=None, nonnegative=False, bits=8, **kwargs):
        kwargs.setdefault("dtype", "float32")  # whatever policy the model was trained by
        super().__init__(**kwargs)
        if bits not in ACTIVATION_BITS:
            raise ValueError(f"activation bits are {bits!r}; known: {', '.join(map(str, ACTIVATION_BITS))}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum!r}; it must be from 0 to 1")
        if fixed_range is not None and not fixed_range[0] <= 0 <= fixed_range[1]:
            raise ValueError(f"fixed_range is {fixed_range!r}; it must hold zero, which padding needs")
        self.momentum = momentum
        self.fixed_range = None if fixed_range is None else tuple(map(float, fixed_range))
        self.nonnegative = nonnegative
        self.bits = bits
        # While calibrating: the momentum for the next batch, which the range follows outside of training too.
        self.calibration_momentum = None

    def build(self, input_shape):
        start = (np.nan, np.nan) if self.fixed_range is None else self.fixed_range
        initializer = keras.initializers.Constant(np.float32(start))
        self.range = self.add_weight("range", [2], tf.float32, initializer, trainable=False)
        self.is_frozen = self.add_weight("is_frozen", [], tf.bool, keras.initializers.Zeros(), trainable=False)
        super().build(input_shape)

    def freeze(self, frozen=True):
        """Stops the running range, or lets it run again; in effect at once, also in a compiled training step."""
        self.is_frozen.assign(frozen)

    def set_range(self, minimum, maximum):
        """Sets the range, widened to hold zero.

        Raises:
          ValueError: if it is not finite, or not a range; and for a fixed range.
        """
        if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
            raise ValueError(f"{self.name}: [{minimum}, {maximum}] is no range; were there NaN or no images?")
        if self.fixed_range is not None:
            raise ValueError(f"{self.name}: the range is fixed at {list(self.fixed_range)}")
        self.range.assign([min(minimum, 0.0), max(maximum, 0.0)])

    def scale(self) -> float:
        """The step of the grid; NaN while there is no range."""
        minimum, maximum = self.bounds()
        return float((maximum - minimum) / (2 * _LARGEST_16_BIT_CODE if self.bits == 16 else 255))

    def bounds(self):
        """(minimum, maximum) of the grid, both codes of it as zero is.

        Nudged here and not by TensorFlow's operation: where zero falls between two codes, that and the converter take
        different ones.
        """
        return _bounds(self.range, self.bits)

    def call(self, inputs, training=None):
        values = tf.cast(inputs, tf.float32)
        follows = (training or self.calibration_momentum is not None) and self.fixed_range is None
        minimum, maximum = self._follow(tf.stop_gradient(values)) if follows else self.bounds()
        outputs = tf.quantization.fake_quant_with_min_max_vars(
            values,
            tf.stop_gradient(minimum),
            tf.stop_gradient(maximum),
            num_bits=self.bits,
            narrow_range=self.bits == 16,
        )
        if training:
            outputs = _straight_through(outputs, values, minimum, maximum)
        return tf.cast(outputs, inputs.dtype)

    def _follow(self, values):
        momentum = self.momentum if self.calibration_momentum is None else self.calibration_momentum
        shares = tf.constant([momentum, 1 - momentum], tf.float32)
        follow = shared_graph(_followed, (), (2,), None, (2,))
        followed, bounds = follow(self.is_frozen, self.range, values, shares, self.nonnegative, self.bits)
        self.range.assign(followed)
        return bounds

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "fixed_range": self.fixed_range,
            "nonnegative": self.nonnegative,
            "bits": self.bits,
        }


def _straight_through(outputs, values, minimum, maximum):
    """The outputs, whose gradient to the values is 1 inside the range and 0 outside.

    TensorFlow's gradients of fake quantization, and of a ReLU before it, would keep the values for as long as outputs;
    this one is of both, and keeps a byte for each.
    """
    is_after_relu = not tf.executing_eagerly() and values.op.type == "Relu"
    is_inside = ((values > 0.0) if is_after_relu else (values >= minimum)) & (values <= maximum)

    @tf.custom_gradient
    def function(_):
        return outputs, lambda upstream: tf.where(is_inside, upstream, 0.0)

    return function(values.op.inputs[0] if is_after_relu else values)


def _followed(is_frozen, running, values, shares, nonnegative, bits):
    """The running range after a batch, and its bounds; shares are that of the range before and the batch's."""

    def moved():
        minimum = 0.0 if nonnegative else tf.minimum(tf.reduce_min(values), 0.0)
        batch = tf.stack([minimum, tf.maximum(tf.reduce_max(values), 0.0)])
        return tf.where(tf.math.is_nan(running), batch, shares[0] * running + shares[1] * batch)

    followed = tf.cond(is_frozen, lambda: running, moved)
    return followed, _bounds(followed, bits)


def _bounds(running, bits):
    minimum, maximum = tf.unstack(running)
    if bits == 16:
        largest = tf.maximum(-minimum, maximum)
        largest = tf.where(largest < _DEAD_WIDTH, _NOMINAL_WIDTH, largest)
        return -largest, largest
    width = tf.where(maximum - minimum < _DEAD_WIDTH, _NOMINAL_WIDTH, maximum - minimum)
    scale = width / 255
    zero_code = tf.round(-minimum / scale)
    return -zero_code * scale, (255 - zero_code) * scale


def quantizers(model: keras.Model) -> list[ActivationQuantizer]:
    """The quantizers of a model, in its order of layers."""
    return graph.find_layers(model, ActivationQuantizer)


def quantize_activations(
    model: keras.Model,
    replace_weighted: Callable | None = None,
    make_quantizer: Callable = ActivationQuantizer,
    weighted: tuple = WEIGHTED_LAYERS,
    bits: int = 8,
) -> keras.Model:
    """A copy of a fused model with a quantizer wherever an integer TFLite file of it rounds.

    That is after inputs and after every operation that computes, but not after those whose output has its input's grid
    (reshaping, padding, pooling but for the global mean, upsampling), nor between an operation and the ReLU that is
    fused with it. Activations other than ReLU become layers of their own. Nested models become part of the copy, whose
    layers have the names of `tf_repvgg.graph.unique_names`.

    Args:
      model: functional deploy-form model.
      replace_weighted: (Conv2D, DepthwiseConv2D or Dense layer, changes to its configuration: name and activation)
        -> callable on tensors that takes the layer's place; by default a copy.
      make_quantizer: makes each quantizer from the keywords of `ActivationQuantizer`.
      weighted: classes of the layers that `replace_weighted` is asked for.
      bits: of activations, 8 or 16.

    Raises:
      ValueError: if the model is not functional, or for other bits.
    """
    if not graph.is_functional(model):
        raise ValueError(f"quantization needs a functional Keras 2 model, but got {type(model).__name__}")
    names = graph.unique_names(model)
    followed_by_relu = _followed_by_relu(model)
    replace_weighted = replace_weighted or (lambda layer, changes: graph.copy_layer(layer, **changes))
    calls = collections.Counter()

    def quantized(tensors, name, **options):
        def one(tensor):
            if not tensor.dtype.is_floating:
                return tensor
            calls[name] += 1
            suffix = f"_{calls[name]}" if calls[name] > 1 else ""
            return make_quantizer(name=f"{name}_quantizer{suffix}", bits=bits, **options)(tensor)

        return tf.nest.map_structure(one, tensors)

    def replace(layer):
        name = names[id(layer)]
        activation = _activation_name(layer)
        options = _quantizer_options(activation, bits)
        if isinstance(layer, WEIGHTED_LAYERS) and activation not in _FUSED_ACTIVATIONS:
            linear = replace_weighted(layer, {"name": name, "activation": "linear"})
            activate = keras.layers.Activation(layer.activation, name=f"{name}_activation")
            return lambda *arguments, **keywords: quantized(
                activate(quantized(linear(*arguments, **keywords), name)), f"{name}_activation", **options
            )
        if isinstance(layer, weighted):
            copy = replace_weighted(layer, {"name": name})
        else:
            copy = graph.copy_layer(layer, name=name)
        if isinstance(layer, _RANGE_PRESERVING) or id(layer) in followed_by_relu or activation == "linear_only":
            return copy
        return lambda *arguments, **keywords: quantized(copy(*arguments, **keywords), name, **options)

    def replace_input(tensor):
        return quantized(tensor, tensor.node.layer.name)

    return graph.rebuild(model, replace, replace_input, inline_nested=True)


def quantizer_before(tensor) -> ActivationQuantizer:
    """The quantizer whose grid a tensor of a quantized model is on.

    Raises:
      ValueError: if there is none between the model's input and the tensor.
    """
    while not isinstance(layer := tensor.node.layer, ActivationQuantizer):
        if tensor.node.is_input:
            raise ValueError(f"nothing after the input {layer.name!r} is quantized")
        tensor = tf.nest.flatten(tensor.node.keras_inputs)[0]
    return layer


def _activation_name(layer):
    """The activation that a layer ends with, by Keras's name; None for layers that have none."""
    if isinstance(layer, keras.layers.ReLU):
        is_plain = not np.any(layer.negative_slope) and not np.any(layer.threshold)
        return {None: "relu", 6.0: "relu6"}.get(layer.max_value) if is_plain else None
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", None)
    return "linear_only" if name == "linear" and isinstance(layer, keras.layers.Activation) else name


def _quantizer_options(activation, bits):
    if activation in FIXED_RANGES:
        return {"fixed_range": FIXED_RANGES[activation] if bits == 8 else _FIXED_RANGE_16}
    return {"nonnegative": True} if activation in ("relu", "relu6") else {}


def _followed_by_relu(model):
    """Ids of layers that compute and whose every output goes into a ReLU layer alone, which runtimes fuse with them."""
    relu_only, others = set(), set()
    for owner in graph.functional_models(model):
        nodes = graph.nodes(owner)
        sources = {key: node.layer for node in nodes for key in node.flat_output_ids}
        outputs = graph.output_keys(owner)
        for node in nodes:
            is_relu = not isinstance(node.layer, WEIGHTED_LAYERS) and _activation_name(node.layer) in ("relu", "relu6")
            for key in node.flat_input_ids:
                source = sources.get(key)
                if source is None:
                    continue
                is_only = graph.count_uses(owner, key) == 1 and key not in outputs
                is_linear = _activation_name(source) in (None, "linear")
                fits = is_relu and is_only and is_linear and not isinstance(source, _RANGE_PRESERVING)
                (relu_only if fits else others).add(id(source))
        others.update(id(sources[key]) for key in outputs if key in sources)
    return relu_only - others
