"""The network that a method of post-training quantization works on: float and quantized form, side by side."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tf_keras as keras
from tqdm import tqdm

from tf_repvgg import fusion, graph
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.activations import copy_without_rounding, quantize_activations, quantizer_before
from tf_repvgg.quantization.checks import check_finite, clusters_by_layer, per_channel_by_layer
from tf_repvgg.quantization.ptq.calibration import Calibration
from tf_repvgg.quantization.ptq.options import Options
from tf_repvgg.quantization.quantized_layers import (
    apply_kernel,
    bias_of,
    holds_float_kernel,
    kernel_of,
    make_quantized_layer,
)
from tf_repvgg.quantization.uniform import MAX_BIAS_CODE, QuantizedKernel, min_scale_of_bias

_BATCH = 64


class Network:
    """A fused model, a quantized copy of it, and calibration images; methods change it step by step.

    A method may change the weights of the float form, as long as it still computes the same function; it may set the
    ranges of activations; and it may set quantized kernels and biases. After the last method,
    `tf_repvgg.quantization.ptq.quantize` sets everything by min-max if anything is not set.

    Args:
      model: Fused model.
      images: Calibration images, float32 [count, height, width, channels]; for several inputs, a list of such arrays
        in the order of `model.inputs`; None for methods that need none.
      bits: {layer name: weight bits}.
      per_channel: Whether each output channel has a weight scale of its own, or that by name pattern.
      options: Settings of the methods.

    Attributes:
      float: Float form of the model; methods may change its weights.
      quantized: Quantized form of the model.
      layers: {name: float layer with weights}, in execution order.
      bits: {name: weight bits}.
      per_channel: {name: whether each output channel has a weight scale of its own}.
      clusters: {name: number of clusters of the layer's codebooks}.
      quantizers: {name: quantizer of activations in the quantized form}.
      kernels: {name: quantized kernel that was set last}.
      statistics: {name of a fused block: `tf_repvgg.fusion.PreActivationStatistics` or None}.
      divisors: {name: factors by which equalization has divided the float layer's output channels}.
      notes: Lines for the user on what methods left out or undid.
      calibration: Calibration images; runs models on them.

    Raises:
      ValueError: If weights hold infinities or NaN, or for bad numbers of clusters.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import ptq
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> images = np.zeros([2, 8, 8, 3], np.float32)
      >>> network = ptq.Network(model, images, bits={"conv": 4}, per_channel=True, options=ptq.Options())
      >>> ptq.METHODS["min_max"].function(network)
      >>> network.kernels["conv"].codes.shape, int(network.kernels["conv"].codes.max()) <= 7
      ((3, 3, 3, 4), True)
    """

    def __init__(
        self,
        model: keras.Model,
        images: np.ndarray | Sequence[np.ndarray] | None,
        bits: dict[str, int],
        per_channel: bool | str | Mapping[str, bool],
        options: Options,
    ) -> None:
        self.options, self.bits = options, bits
        self.per_channel = per_channel_by_layer(model, per_channel)
        self.calibration = Calibration(images)
        self._model = model
        self._range_rule: Callable[[Network], None] | None = None
        self.float = copy_without_rounding(model)
        names = graph.unique_names(model)
        self.quantized = quantize_activations(
            model,
            lambda layer, changes: make_quantized_layer(layer, self.per_channel[names[id(layer)]], **changes),
            bits=options.activation_bits,
        )
        self.layers = {layer.name: layer for layer in self.float.layers if holds_float_kernel(layer)}
        if options.number_of_clusters is None:
            self.clusters = {name: 2**width for name, width in bits.items()}
        else:
            self.clusters = clusters_by_layer(model, options.number_of_clusters)
        self.quantizers = {
            layer.name: layer for layer in self.quantized.layers if isinstance(layer, ActivationQuantizer)
        }
        self.kernels: dict[str, QuantizedKernel] = {}
        self.statistics = fusion.pre_activation_statistics(model)
        self.divisors = {name: np.ones_like(self.bias(name)) for name in self.layers}
        self.notes: list[str] = []
        for layer in self.layers.values():
            check_finite(layer)

    @functools.cached_property
    def reference_outputs(self) -> list[np.ndarray]:
        """Outputs of the float form before any change, on the calibration images; none if there are no images."""
        if self.calibration.is_empty:
            return []
        return self.calibration.compute(self._model, self._model.outputs)

    @property
    def free_ranges(self) -> list[str]:
        """Names of the quantizers whose range a method may set: TFLite does not prescribe it."""
        return [name for name, quantizer in self.quantizers.items() if quantizer.fixed_range is None]

    @property
    def has_ranges(self) -> bool:
        """Whether all ranges of activations are set."""
        return all(np.all(np.isfinite(quantizer.range.numpy())) for quantizer in self.quantizers.values())

    @property
    def is_complete(self) -> bool:
        """Whether all ranges and kernels are set."""
        return self.has_ranges and self.kernels.keys() == self.layers.keys()

    def replace_calibration(self, images: list[np.ndarray]) -> None:
        """Takes other calibration images from now on.

        Args:
          images: An array [count, ...] for each input.
        """
        self.calibration = Calibration(images)
        self.__dict__.pop("reference_outputs", None)  # of the former images

    def set_ranges(self, rule: Callable[["Network"], None]) -> None:
        """Sets all ranges of activations for the float network as it is now, by the rule that was given first.

        So a method before others decides on ranges, and theirs are defaults.

        Args:
          rule: Function that sets the range of every quantizer in `free_ranges`.
        """
        self._range_rule = self._range_rule or rule
        self._range_rule(self)

    def is_shared(self, name: str) -> bool:
        """Whether the layer is called more than once, so that it has no single input."""
        return len(self.quantized.get_layer(name).inbound_nodes) > 1

    def kernel(self, name: str) -> np.ndarray:
        """The float kernel in the layout of `QuantizedKernel`."""
        return kernel_of(self.layers[name])

    def bias(self, name: str) -> np.ndarray:
        """The float bias, zeros where the layer has none: shape [output channels]."""
        return bias_of(self.layers[name])

    def get_quantized_bias(self, name: str) -> np.ndarray:
        """The bias that the layer has in the quantized network: shape [output channels]."""
        layer = self.quantized.get_layer(name)
        return layer.bias.numpy() if layer.use_bias else self.bias(name)

    def get_quantized_biases(self) -> dict[str, np.ndarray]:
        """{name: bias in the quantized network} of the layers that have one."""
        return {name: self.get_quantized_bias(name) for name, layer in self.layers.items() if layer.use_bias}

    def min_scale(self, name: str) -> np.ndarray:
        """The smallest weight scale of each output channel at which the bias still fits into 32 bits."""
        return min_scale_of_bias(self.bias(name), self._input_scale(name))

    def _input_scale(self, name):
        """The smallest step of the grids that the layer's inputs are on."""
        nodes = self.quantized.get_layer(name).inbound_nodes
        return min(quantizer_before(node.keras_inputs[0]).scale() for node in nodes)

    def set_kernel(self, name: str, kernel: QuantizedKernel, bias: np.ndarray | None = None) -> None:
        """Sets codes, scale and bias of a layer of the quantized network.

        Args:
          name: Name of the layer.
          kernel: Codes and scale.
          bias: Bias [output channels], clipped to the range of 32 bits; None for the float layer's.
        """
        self.quantized.get_layer(name).set_quantized_kernel(kernel)
        self.kernels[name] = kernel
        self.set_bias(name, self.bias(name) if bias is None else bias)

    def set_bias(self, name: str, bias: np.ndarray) -> None:
        """Sets the bias of a layer of the quantized network, if it has one, clipped to the range of 32 bits."""
        if self.layers[name].use_bias:
            largest = self.kernels[name].scale * self._input_scale(name) * np.float32(MAX_BIAS_CODE)
            self.quantized.get_layer(name).bias.assign(np.clip(bias, -largest, largest))

    def compute_activations(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields {name in `free_ranges`: activations of the float network that this quantizer will round}, by batch."""
        return self.calibration.compute_layers(self.float, self.free_ranges)

    def compute_float_outputs(self) -> list[np.ndarray]:
        """Outputs of the float network as it is now."""
        return self.calibration.compute(self.float, self.float.outputs)

    def compute_error(self, actual: Sequence[np.ndarray] | None = None) -> float:
        """Mean squared error of the quantized network's outputs against `reference_outputs`.

        Args:
          actual: Outputs of the quantized network on the calibration images; computed by default.
        """
        if actual is None:
            actual = self.calibration.compute(self.quantized, self.quantized.outputs)
        pairs = zip(self.reference_outputs, actual, strict=True)
        return float(np.mean([np.mean(np.square(expected - outputs)) for expected, outputs in pairs]))

    def compute_layer_outputs(self, name: str) -> np.ndarray:
        """Outputs of the float layer, its activation included."""
        (outputs,) = self.calibration.compute(self.float, [self.layers[name].output])
        return outputs

    def compute_linear_outputs(self, name: str) -> np.ndarray:
        """Outputs of the float layer before its activation."""
        layer = self.layers[name]
        (inputs,) = self.calibration.compute(self.float, [layer.input])
        return _compute_linear(layer, inputs, self.kernel(name)) + self.bias(name)

    def compute_mean_linear_outputs(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """{name: mean of `compute_linear_outputs` over images and pixels, per channel}."""
        # The layers are linear: means of the outputs are the outputs of mean inputs.
        layers = [self.layers[name] for name in names]
        means = self.calibration.compute_means(self.float, [layer.input for layer in layers]) if layers else []
        return {
            layer.name: _average_channels(_compute_linear(layer, mean, self.kernel(layer.name))) + self.bias(layer.name)
            for layer, mean in zip(layers, means, strict=True)
        }

    def compute_quantized_inputs(self, name: str) -> np.ndarray:
        """Inputs of the layer in the quantized network as it is now."""
        (inputs,) = self.calibration.compute(self.quantized, [self.quantized.get_layer(name).input])
        return inputs

    def compute_quantized_linear_outputs(self, name: str) -> np.ndarray:
        """Outputs of the quantized layer without bias and activation."""
        layer, kernel = self.quantized.get_layer(name), self.kernels[name].dequantize()
        return _compute_linear(layer, self.compute_quantized_inputs(name), kernel)

    def apply_to_mean_input(self, name: str, mean: np.ndarray) -> np.ndarray:
        """Mean of `compute_quantized_linear_outputs` over images and pixels, per channel.

        Args:
          name: Name of the layer.
          mean: Mean [1, ...] over images of its inputs in the quantized network.
        """
        layer, kernel = self.quantized.get_layer(name), self.kernels[name].dequantize()
        return _average_channels(_compute_linear(layer, mean, kernel))

    def show_progress(self, steps: Collection, description: str, unit: str = "layer") -> Any:
        """The steps as an iterable, with a progress bar if `Options.progress` is set."""
        return tqdm(steps, description, unit=unit, disable=not self.options.progress, leave=False)


def _compute_linear(layer, inputs, kernel):
    batches = [apply_kernel(layer, inputs[start : start + _BATCH], kernel) for start in range(0, len(inputs), _BATCH)]
    return np.concatenate([batch.numpy() for batch in batches])


def _average_channels(outputs):
    return outputs.mean(axis=tuple(range(outputs.ndim - 1)))


def spread_over_kernel(values: np.ndarray, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """Gives each weight of a kernel the value of the input channel that it reads.

    Args:
      values: Values [input channels] of the layer.
      kernel_shape: Shape [..., channels read by an output, output channels] of the kernel. A grouped convolution reads
        fewer channels than its input has.

    Returns:
      Array [channels read, output channels], or with 1 in place of the latter.
    """
    *_, reads, channels = kernel_shape
    groups = len(values) // reads
    # Output channels of one group follow one another and read the same inputs.
    return np.repeat(np.asarray(values).reshape(groups, reads).T, channels // groups if groups > 1 else 1, axis=1)
