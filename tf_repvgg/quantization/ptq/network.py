"""The network that a method of post-training quantization works on: float and quantized form, side by side."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

from tf_repvgg.quantization.activations import ActivationQuantizer, quantize_activations, quantizer_before
from tf_repvgg.quantization.checks import check_finite, values_by_layer
from tf_repvgg.quantization.quantized_layers import WEIGHTED_LAYERS, bias_of, kernel_of, linear, quantized_form
from tf_repvgg.quantization.uniform import MAX_BIAS_CODE, QuantizedKernel, min_scale_of_bias

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What methods can be told beside bits and granularity.

    Attributes:
      percentile: of the percentile method: the share of values inside the range, in percent.
      iterations: optimizer steps for each layer, of AdaRound and AdaQuant; bias tuning takes a quarter of that.
      number_of_clusters: states of codebooks, 2 to 256, or by layer like bits; None for 2^bits.
      activation_bits: 8 or 16.
      input_range: lowest and highest value of an image, for methods without calibration images: pixels of 0 and 255,
        normalised.
      seed: of everything drawn at random.
      progress: whether long methods show a progress bar.
    """

    percentile: float = 99.99
    iterations: int = 500
    number_of_clusters: int | str | Mapping[str, int] | None = None
    activation_bits: int = 8
    input_range: tuple[float, float] = (-1.0, 127 / 128)
    seed: int = 0
    progress: bool = False


class Network:
    """A fused model, a quantized copy of it, and calibration images; methods change it step by step.

    Methods may change the weights of the float form, as long as it stays the same function; set ranges of activations;
    and set quantized kernels and biases. They leave what they do not care for to the defaults, which
    `tf_repvgg.quantization.ptq.quantize` fills in.

    Args:
      model: fused model.
      images: float32 [count, height, width, channels]; None for methods that need none.
      bits: {layer name: weight bits}.
      per_channel: granularity of weight scales.
      options: see `Options`.

    Attributes:
      layers: {name: float layer with weights}, in execution order.
      bits, states: {name: weight bits}, {name: states of its codebook}.
      kernels: {name: the quantized kernel set last}.
      statistics: {name of a fused block: its `PreActivationStatistics` or None}, as fusion keeps them.
      divisors: {name: what equalization has divided each output channel of the float layer by}.
      notes: what users should know of what was done or left out, line by line.
    """

    def __init__(self, model, images, bits, per_channel, options):
        self.images, self.per_channel, self.options = images, per_channel, options
        self.float = quantize_activations(
            model, make_quantizer=lambda name, **_: keras.layers.Activation("linear", name=name)
        )
        self.quantized = quantize_activations(
            model,
            lambda layer, changes: quantized_form(layer, per_channel, **changes),
            bits=options.activation_bits,
        )
        self.layers = {layer.name: layer for layer in self.float.layers if isinstance(layer, WEIGHTED_LAYERS)}
        self.bits = bits
        if options.number_of_clusters is None:
            self.states = {name: 2**its_bits for name, its_bits in bits.items()}
        else:
            self.states = values_by_layer(model, options.number_of_clusters, "numbers of clusters", 2, 256)
        self.quantizers = {
            layer.name: layer for layer in self.quantized.layers if isinstance(layer, ActivationQuantizer)
        }
        self.kernels = {}
        self.statistics = getattr(model, "pre_activation_statistics", {})
        self.divisors = {name: np.ones_like(self.bias(name)) for name in self.layers}
        self.notes = []
        self._runs = {}
        self.expected = None if images is None else self.float_outputs()
        for layer in self.layers.values():
            check_finite(layer)

    @property
    def free_ranges(self) -> list[str]:
        """Names of the quantizers whose range is a method's to set."""
        return [name for name, quantizer in self.quantizers.items() if quantizer.fixed_range is None]

    @property
    def has_ranges(self) -> bool:
        return all(np.all(np.isfinite(quantizer.range.numpy())) for quantizer in self.quantizers.values())

    @property
    def is_complete(self) -> bool:
        """Whether all ranges and kernels are set."""
        return self.has_ranges and self.kernels.keys() == self.layers.keys()

    def activations(self) -> Iterable[dict[str, np.ndarray]]:
        """What the float network computes where the quantized one has a range to be set, batch by batch."""
        names = self.free_ranges
        for found in self._batches(self.float, [self.float.get_layer(name).output for name in names]):
            yield dict(zip(names, found, strict=True))

    def kernel(self, name) -> np.ndarray:
        """The float kernel in the layout of `QuantizedKernel`."""
        return kernel_of(self.layers[name])

    def bias(self, name) -> np.ndarray:
        return bias_of(self.layers[name])

    def min_scale(self, name) -> np.ndarray:
        """The smallest weight scale of each output channel at which the bias still fits into 32 bits."""
        return min_scale_of_bias(self.bias(name), self._input_scale(name))

    def _input_scale(self, name):
        """The smallest step of the grids that the layer's inputs are on."""
        nodes = self.quantized.get_layer(name).inbound_nodes
        return min(quantizer_before(node.keras_inputs[0]).scale() for node in nodes)

    def set_kernel(self, name, quantized: QuantizedKernel, bias=None):
        """Gives a layer of the quantized network its codes, and the float layer's bias or another one."""
        self.quantized.get_layer(name).set_quantized_kernel(quantized)
        self.kernels[name] = quantized
        self.set_bias(name, self.bias(name) if bias is None else bias)

    def set_bias(self, name, bias):
        """Gives a layer of the quantized network a bias, if it has one, cut to what 32 bits hold."""
        if self.layers[name].use_bias:
            largest = self.kernels[name].scale * self._input_scale(name) * np.float32(MAX_BIAS_CODE)
            self.quantized.get_layer(name).bias.assign(np.clip(bias, -largest, largest))

    def quantized_bias(self, name) -> np.ndarray:
        """The bias that the layer has in the quantized network."""
        layer = self.quantized.get_layer(name)
        return layer.bias.numpy() if layer.use_bias else self.bias(name)

    def biases(self) -> dict[str, np.ndarray]:
        """The biases of the quantized network by layer, where there are any."""
        return {name: self.quantized_bias(name) for name, layer in self.layers.items() if layer.use_bias}

    def outputs_of(self, name) -> np.ndarray:
        """What the float layer computes on the calibration images, its activation included."""
        return self._run(self.float, self.layers[name].output)

    def inputs_of(self, name) -> np.ndarray:
        """What the layer is given in the network quantized so far."""
        return self._run(self.quantized, self.quantized.get_layer(name).input)

    def linear_outputs_of(self, name) -> np.ndarray:
        """What the float layer computes before its activation."""
        layer = self.layers[name]
        return _linear(layer, self._run(self.float, layer.input), self.kernel(name)) + self.bias(name)

    def linear_outputs_of_quantized(self, name) -> np.ndarray:
        """What the quantized layer computes on `inputs_of(name)`, without bias and activation."""
        return _linear(self.quantized.get_layer(name), self.inputs_of(name), self.kernels[name].dequantize())

    def mean_linear_outputs(self, names) -> dict[str, np.ndarray]:
        """Per channel, means of `linear_outputs_of` over images and pixels: linear, so those of the mean inputs."""
        layers = [self.layers[name] for name in names]
        means = self._means(self.float, [layer.input for layer in layers]) if layers else []
        return {
            layer.name: _channel_means(_linear(layer, mean, self.kernel(layer.name))) + self.bias(layer.name)
            for layer, mean in zip(layers, means, strict=True)
        }

    def mean_linear_output_of_quantized(self, name) -> np.ndarray:
        """Per channel, the mean of `linear_outputs_of_quantized` over images and pixels."""
        layer = self.quantized.get_layer(name)
        (mean,) = self._means(self.quantized, [layer.input])
        return _channel_means(_linear(layer, mean, self.kernels[name].dequantize()))

    def is_shared(self, name) -> bool:
        """Whether the layer is called more than once, so that it has no one input."""
        return len(self.quantized.get_layer(name).inbound_nodes) > 1

    def float_outputs(self) -> list[np.ndarray]:
        """All outputs of the float network as it is now; `expected` holds those of the original."""
        return self._run(self.float, self.float.outputs)

    def error(self) -> float:
        """Mean squared error of the quantized network's outputs on the calibration images."""
        found = self._run(self.quantized, self.quantized.outputs)
        return float(np.mean([np.mean(np.square(mine - its)) for mine, its in zip(self.expected, found, strict=True)]))

    def progress(self, parts, description, unit="layer"):
        return tqdm(parts, description, unit=unit, disable=not self.options.progress, leave=False)

    def _run(self, model, tensors):
        """Values of a tensor of the model, or of a list of them, on all calibration images."""
        parts = list(self._batches(model, tf.nest.flatten(tensors)))
        found = [np.concatenate(of_tensor) for of_tensor in zip(*parts, strict=True)]
        return found if isinstance(tensors, list) else found[0]

    def _means(self, model, tensors):
        """Means of tensors over all calibration images, each with a batch dimension of 1."""
        sums = [0.0] * len(tensors)
        for found in self._batches(model, tensors):
            sums = [total + np.sum(values, axis=0, keepdims=True) for total, values in zip(sums, found, strict=True)]
        return [total / len(self.images) for total in sums]

    def _batches(self, model, tensors):
        # Tensors stay with their ids. What is asked for once, such as a layer's inputs, is not worth a trace; a graph,
        # once traced, reads weights anew.
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._runs:
            run = functools.partial(keras.Model(model.inputs, tensors), training=False)
            self._runs[key] = tensors, tf.function(run)
        else:
            _, run = self._runs[key]
        for start in range(0, len(self.images), _BATCH):
            found = run(tf.constant(self.images[start : start + _BATCH]))
            yield [values.numpy() for values in tf.nest.flatten(found)]


def _linear(layer, inputs, kernel):
    parts = [linear(layer, inputs[start : start + _BATCH], kernel) for start in range(0, len(inputs), _BATCH)]
    return np.concatenate([part.numpy() for part in parts])


def _channel_means(outputs):
    return outputs.mean(axis=tuple(range(outputs.ndim - 1)))


def by_input_channel(values, kernel_shape) -> np.ndarray:
    """Spreads what is known of each input channel over the weights that read it.

    Args:
      values: [input channels] of the layer.
      kernel_shape: [..., channels read by an output, output channels], fewer than there are in a grouped convolution.

    Returns:
      Array [channels read, output channels], or with 1 in place of the latter.
    """
    *_, reads, channels = kernel_shape
    groups = len(values) // reads
    # Output channels of one group follow one another and read the same inputs.
    return np.repeat(np.asarray(values).reshape(groups, reads).T, channels // groups if groups > 1 else 1, axis=1)
