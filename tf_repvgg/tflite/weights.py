"""Writing weights and biases into a calibrated file, code for code, and naming them after the layers of the model."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tf_keras as keras
from absl import logging
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg import converter, graph
from tf_repvgg.quantization.activations import quantizers
from tf_repvgg.quantization.quantized_layers import (
    WEIGHTED_LAYERS,
    QuantizedLayer,
    bias_of,
    kernel_of,
    name_weighted_layers,
)
from tf_repvgg.quantization.uniform import MAX_BIAS_CODE, QuantizedKernel, min_scale_of_bias, quantize_min_max
from tf_repvgg.tflite import complexity, flatbuffer

METADATA_NAME = "TF_REPVGG_INPUT"
# The converter gives an activation that is zero on every calibration image a range of +-1e-6. XNNPACK refuses to load a
# file with scales that differ so much from their neighbours.
_DEAD_SCALE = 1e-8
_NOMINAL_SCALE = 2.0**-7
_FIXED_SCALE_16 = 2.0**-15
# Relative to the largest weight of a kernel; far below 1 / 254, the largest change by rounding to 8 bits.
_ROUNDING = 1e-6


def with_weights(
    file: bytes,
    model: keras.Model,
    weight_bits: int = 8,
    per_channel: bool = True,
    kernels: Mapping[str, QuantizedKernel] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Writes a model's weights and biases into a calibrated int8 file of that model, code for code.

    Weights of other operations, such as an embedding or a product with a matrix, and of layers inside of layers keep
    the 8 bits of the converter; a warning names them if fewer were requested.

    Layers in `kernels` get exactly those codes and scales, and quantized layers their own. All other kernels are
    rounded by `quantize_min_max`, except kernels that are 8-bit codes times one scale already, which keep them.
    Biases are int32, or int64 if activations are int16, with scale (input scale * weight scale).

    This is also where the layer of every operator is established and kept: its weight tensor is named "<layer>/kernel".
    Here <layer> is the layer's name, preceded by the names of nested models if several layers have it.

    Args:
      file: File of the model, as `convert` or TensorFlow's integer conversion makes it.
      model: Deploy-form model.
      weight_bits: Bits of the uniform weight grid, from 2 to 8; stored in int8.
      per_channel: Whether each output channel has a weight scale of its own; otherwise each tensor has one.
      kernels: {layer name: codes and scales} of layers that are quantized already. The codes of a DepthwiseConv2D
        have shape [height, width, 1, channels * depth multiplier].
      metadata: JSON-serializable content to store in the file under the name TF_REPVGG_INPUT.

    Returns:
      The new file.

    Raises:
      ValueError: If the file is of another model, a layer's weights cannot be put on the
        grid, `kernels` names no layer of the model or several, or has another shape, or given codes leave no room
        for a bias.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> from tf_repvgg.quantization import QuantizedKernel
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
      >>> file = tflite.convert(model, calibration=np.ones([1, 8, 8, 3]))
      >>> kernel = QuantizedKernel(np.ones([3, 3, 3, 4], np.int8), np.array([0.5], np.float32))
      >>> (written,) = tflite.weight_codes(tflite.with_weights(file, model, kernels={"conv": kernel}))
      >>> int(written.codes.max()), written.scale.tolist()
      (1, [0.5])
    """
    flat = flatbuffer.unpack(file)
    _check_supported(model, weight_bits)
    names = layer_names(model)
    layers = graph.find_layers(model, WEIGHTED_LAYERS)
    given = {id(layer): layer.get_quantized_kernel() for layer in layers if isinstance(layer, QuantizedLayer)}
    given |= _find_given_layers(kernels or {}, layers, names)
    has_quantizers = bool(quantizers(model))
    # `verify` knows no rounded weights of layers inside of layers, whose activations have no quantizers either.
    rounded = {id(layer) for layer in (graph.leaves(model) if has_quantizers else layers)}
    for subgraph in flat.subgraphs:
        _widen_dead_activations(flat, subgraph)
        _mend_16_bit_activations(flat, subgraph)
        for use in _find_uses(flat, subgraph, layers):
            bias = bias_of(use.layer)
            input_scales = [
                flatbuffer.activations_tensor(flat, subgraph, operator).quantization.scale[0]
                for operator in use.operators
            ]
            kernel = given.get(id(use.layer))
            if kernel is None:
                min_scale = min_scale_of_bias(bias, min(input_scales))
                bits, by_channel = (weight_bits, per_channel) if id(use.layer) in rounded else (8, True)
                kernel = _quantize_kernel(kernel_of(use.layer), bits, by_channel, min_scale)
            tensor = flatbuffer.weights_tensor(subgraph, use.operators[0])
            flatbuffer.set_weights(flat, tensor, use.layout, kernel.codes, kernel.scale)
            flatbuffer.set_weights_name(tensor, names[id(use.layer)])
            for operator, input_scale in zip(use.operators, input_scales, strict=True):
                bias_scale = input_scale * kernel.scale
                # Over a quantizer, the converter folds nothing.
                folded = bias if has_quantizers else _find_folded_bias(flat, subgraph, operator, bias)
                codes = _round_bias(names[id(use.layer)], folded, bias_scale)
                flatbuffer.set_bias(flat, subgraph, operator, codes, bias_scale)
    flatbuffer.order_inputs(flat, converter.name_inputs(model))
    if metadata is not None:
        flatbuffer.set_metadata(flat, METADATA_NAME, json.dumps(metadata).encode())
    flatbuffer.drop_unused_buffers(flat)
    if wide := complexity.find_wide_weights(flat, _find_requested_bits(weight_bits, given, layers)):
        logging.warning("%s", describe_wide_weights(wide))
    return flatbuffer.pack(flat)


def describe_wide_weights(names: Sequence[str]) -> str:
    """A line for the user on weights that have more bits than requested.

    Example:
      >>> from tf_repvgg.tflite.weights import describe_wide_weights
      >>> print(describe_wide_weights(["embedding/lookup"]))
      weights that keep 8 bits, as no Conv2D, Conv2DTranspose, DepthwiseConv2D or Dense layer has them: embedding/lookup
    """
    reason = f"as no {name_weighted_layers('or')} layer has them"
    return f"weights that keep 8 bits, {reason}: {', '.join(names)}"


def _find_requested_bits(weight_bits, given, layers):
    """Bits that all weights should have: those of a quantized model's widest layer, or the argument."""
    kernels = [given[id(layer)].codes for layer in layers if isinstance(layer, QuantizedLayer)]
    # Constants that lowering has made kernels of, whose codes are all the same.
    kernels = [codes for codes in kernels if len(np.unique(np.abs(codes))) > 1]
    if not kernels:
        return weight_bits
    counts = [len(np.unique(codes)) for codes in kernels]
    # A small kernel has few codes on a grid of 8 bits too, but then they are most of its weights.
    is_full = [count > min(codes.size, 256) / 2 for count, codes in zip(counts, kernels, strict=True)]
    grid_bits = [int(np.max(np.abs(codes.astype(np.int16)), initial=1)).bit_length() + 1 for codes in kernels]
    count_bits = [int(np.ceil(np.log2(max(2, count)))) for count in counts]
    return max(grid if full else count for grid, count, full in zip(grid_bits, count_bits, is_full, strict=True))


def layer_names(model: keras.Model) -> dict[int, str]:
    """{id of a layer: its name in files} of every Conv2D, Conv2DTranspose, DepthwiseConv2D and Dense layer.

    The names are those of `tf_repvgg.graph.unique_names`. Layers inside of layers have none there; they have their own
    name, and underscores after it if another layer has that name.
    """
    names = graph.unique_names(model)
    layers = graph.find_layers(model, WEIGHTED_LAYERS)
    for layer in layers:
        if id(layer) not in names:
            name = layer.name
            while name in names.values():
                name += "_"
            names[id(layer)] = name
    return {id(layer): names[id(layer)] for layer in layers}


def _quantize_kernel(kernel, weight_bits, per_channel, min_scale):
    if weight_bits == 8:
        # The weights of a user's own `ClusterableLayer`, for example, are on a grid that no variable holds.
        one_grid = quantize_min_max(kernel, per_channel=False, min_scale=min_scale)
        if np.allclose(one_grid.dequantize(), kernel, rtol=0, atol=_ROUNDING * np.max(np.abs(kernel), initial=0)):
            return one_grid
    return quantize_min_max(kernel, weight_bits, per_channel, min_scale=min_scale)


def _widen_dead_activations(flat, subgraph):
    """Gives activations that were zero on all calibration images a scale that runtimes accept."""
    for tensor in subgraph.tensors:
        scale = tensor.quantization.scale if tensor.quantization is not None else None
        is_constant = flat.buffers[tensor.buffer].data is not None
        if not is_constant and scale is not None and len(scale) and scale[0] < _DEAD_SCALE:
            tensor.quantization.scale = np.array([_NOMINAL_SCALE], np.float32)


def _mend_16_bit_activations(flat, subgraph):
    """Gives int16 sigmoids and tanhs the grid that their kernels require; the converter writes an unsigned one."""
    for operator in subgraph.operators:
        output = subgraph.tensors[operator.outputs[0]]
        code = flatbuffer.operator_code(flat, operator)
        has_fixed_scale = code in (schema.BuiltinOperator.LOGISTIC, schema.BuiltinOperator.TANH)
        if has_fixed_scale and output.type == schema.TensorType.INT16:
            output.quantization.scale = np.array([_FIXED_SCALE_16], np.float32)
            output.quantization.zeroPoint = np.zeros(1, np.int64)


class _Use(NamedTuple):
    """A weight tensor of a layer, and the operators that run the layer with it."""

    layer: keras.layers.Layer
    layout: flatbuffer.WeightsLayout
    operators: list[schema.OperatorT]


def _find_uses(flat, subgraph, layers) -> list[_Use]:
    """Finds the layer of every operator that has weights, and gives each layer weight tensors of its own.

    A layer that is called twice stays two operators on one tensor. Layers with equal kernels, which the converter lets
    share a tensor, are separated: they need tensors of their own name, and other scales if their biases differ or codes
    are given for one of them.
    """
    uses: dict[tuple[int, int], _Use] = {}
    owners: dict[int, keras.layers.Layer] = {}
    calls: collections.Counter[int] = collections.Counter()
    kept: list[schema.OperatorT] = []
    for operator in subgraph.operators:
        if (layout := flatbuffer.weights_layout(flat, operator)) is None:
            continue
        tensor = flatbuffer.weights_tensor(subgraph, operator)
        if not flatbuffer.is_constant(flat, tensor):  # a product of two activations
            continue
        layer = _find_layer(flat, tensor, layout, flatbuffer.bias_tensor(flat, subgraph, operator), layers, calls)
        if layer is None:
            kept.append(operator)
            continue
        calls[id(layer)] += 1
        uses.setdefault((id(tensor), id(layer)), _Use(layer, layout, [])).operators.append(operator)
        owners.setdefault(id(tensor), layer)
    for (tensor_id, _), use in uses.items():
        if owners[tensor_id] is not use.layer:
            flatbuffer.give_own_weights(subgraph, use.operators)
    _keep_weights(flat, subgraph, kept, [layer for layer in layers if not calls[id(layer)]])
    return list(uses.values())


def _keep_weights(flat, subgraph, operators, missing_layers):
    """Leaves operators such as a product with a matrix, which is no layer, the weights that the converter wrote.

    Raises:
      ValueError: If there are such operators, and layers whose weights were not found.
    """
    for operator in operators:
        tensor = flatbuffer.weights_tensor(subgraph, operator)
        if missing_layers:
            raise ValueError(
                f"the file's weights {flatbuffer.tensor_name(tensor)!r} {list(flatbuffer.tensor_shape(tensor))} are "
                f"those of no layer of the model, and no weights are those of its layer {missing_layers[0].name!r}: "
                "the file is of another model or of other weights, or the converter has multiplied a constant into "
                "them; give the file that tf_repvgg.tflite.convert makes of this model"
            )
        if (bias := flatbuffer.bias_tensor(flat, subgraph, operator)) is not None:
            # Sets the type that kernels require beside int16 activations.
            flatbuffer.set_bias(flat, subgraph, operator, flatbuffer.bias_codes(flat, bias), bias.quantization.scale)


def _find_layer(flat, tensor, layout, bias_tensor, layers, calls):
    """The layer whose kernel a weight tensor holds, found by value: names do not survive every conversion; or None.

    Of several layers with that kernel, it is the layer with the nearest bias; of several with that bias too, the layer
    with the fewest operators so far.
    """
    codes = flatbuffer.weight_codes(flat, tensor, layout).astype(np.float32)
    scale = tensor.quantization.scale
    candidates = []
    for layer in layers:
        kernel = kernel_of(layer)
        if kernel.shape == codes.shape and np.all(np.abs(kernel - codes * scale) <= 0.51 * scale):
            candidates.append(layer)
    if not candidates:
        return None
    bias = _read_bias(flat, bias_tensor)
    return min(candidates, key=lambda layer: (np.max(np.abs(bias_of(layer) - bias)), calls[id(layer)]))


def _find_folded_bias(flat, subgraph, operator, bias):
    """The bias of a layer, or that of the operator if the converter has folded a constant into it."""
    bias_tensor = flatbuffer.bias_tensor(flat, subgraph, operator)
    if bias_tensor is None:
        return bias
    read = _read_bias(flat, bias_tensor)
    rounding = np.max(bias_tensor.quantization.scale) + _ROUNDING * np.max(np.abs(bias), initial=0)
    return bias if np.all(np.abs(read - bias) <= rounding) else read.astype(np.float32)


def _read_bias(flat, bias_tensor):
    """The bias of an operator, [output channels], or 0.0 without one: the converter leaves out biases of zero."""
    if bias_tensor is None:
        return 0.0
    codes, scale = flatbuffer.bias_codes(flat, bias_tensor), bias_tensor.quantization.scale
    # The converter rounds equal biases of all channels at the scale of the first channel, whatever the others have.
    return codes * (scale[0] if np.all(codes == codes[0]) else scale)


def _round_bias(layer_name, bias, scale):
    """Codes of a bias at a scale of shape [1] or [channels], which fit into 32 bits."""
    codes = np.round(bias / scale.astype(np.float64))
    if np.max(np.abs(codes)) > MAX_BIAS_CODE:
        channel = int(np.argmax(np.abs(codes)))
        raise ValueError(
            f"layer {layer_name!r}: the bias {bias[channel]:g} of channel {channel} overflows int32 at scale "
            f"{np.broadcast_to(scale, codes.shape)[channel]:g}; use a larger weight scale"
        )
    return codes


def _check_supported(model, weight_bits):
    """Refuses layers whose weights would not be on the requested grid."""
    for layer in graph.find_layers(model):
        if isinstance(layer, keras.layers.SeparableConv2D):
            raise ValueError(
                f"layer {layer.name!r} is a {type(layer).__name__}, whose weights cannot be written on a grid of "
                f"{weight_bits} bits; {name_weighted_layers('and')} can"
            )


def _find_given_layers(
    kernels: Mapping[str, QuantizedKernel], layers: Sequence[keras.layers.Layer], names: Mapping[int, str]
) -> dict[int, QuantizedKernel]:
    """{id of the layer: given kernel}; a layer may also go by its own name if no other layer has that."""
    given = {}
    for name, kernel in kernels.items():
        matches = [layer for layer in layers if names[id(layer)] == name]
        matches = matches or [layer for layer in layers if layer.name == name]
        if not matches:
            raise ValueError(
                f"kernels names {name!r}, which is not a layer of the model; known: {', '.join(names.values())}"
            )
        if len(matches) > 1:
            raise ValueError(
                f"kernels names {name!r}, but {len(matches)} layers of the nested models have that name; use "
                f"{' or '.join(repr(names[id(layer)]) for layer in matches)}"
            )
        (layer,) = matches
        if kernel.codes.shape != kernel_of(layer).shape:
            raise ValueError(
                f"layer {name!r}: the codes have shape {kernel.codes.shape}, its kernel {kernel_of(layer).shape}"
            )
        given[id(layer)] = kernel
    return given
