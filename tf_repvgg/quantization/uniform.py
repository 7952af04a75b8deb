"""Weights on a uniform, symmetric integer grid."""

import dataclasses

import numpy as np

# Granularities of weight scales and codebooks: {name in flags and files: the same in prose}.
GRANULARITIES = {"per_tensor": "per tensor", "per_channel": "per channel"}
WEIGHT_BITS = range(2, 9)
# Half of what 32 bits hold: an accumulator starts at the bias and needs room for the products.
MAX_BIAS_CODE = 2**30


def largest_code(bits: int) -> int:
    """The largest code of a symmetric grid, 2^(bits - 1) - 1.

    Args:
      bits: Bits of a code.

    Example:
      >>> from tf_repvgg.quantization import uniform
      >>> [uniform.largest_code(bits) for bits in (2, 4, 8, 16)]
      [1, 7, 127, 32767]
    """
    return 2 ** (bits - 1) - 1


# Integer kernels of the runtimes do not accept -128 as a weight, so the smallest code is -LARGEST_CODE.
LARGEST_CODE = largest_code(8)


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel as integer codes and scales: weight = code * scale.

    Attributes:
      codes: Codes, int8, in the kernel's own layout with output channels last. A depthwise kernel has the layout of the
        equivalent grouped convolution: [height, width, 1, channels * depth multiplier].
      scale: Scale of the codes, float32, of shape [1] (per tensor) or [output channels] (per channel).

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization import QuantizedKernel
      >>> kernel = QuantizedKernel(np.array([[3, -1], [0, 2]], np.int8), np.array([0.5, 2.0], np.float32))
      >>> kernel.dequantize().tolist()
      [[1.5, -2.0], [0.0, 4.0]]
    """

    codes: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The kernel that the codes represent, float32."""
        return self.codes.astype(np.float32) * self.scale


def quantize_min_max(
    kernel: np.ndarray, bits: int = 8, per_channel: bool = True, min_scale: float | np.ndarray = 0.0
) -> QuantizedKernel:
    """Rounds a kernel to a symmetric grid on which the weight of largest magnitude is the largest code.

    Args:
      kernel: Float weights, [..., output channels].
      bits: Bits of a weight, from 2 to 8. The codes are -(2^(bits-1) - 1) .. 2^(bits-1) - 1.
      per_channel: Whether every output channel has its own scale; otherwise the tensor has one.
      min_scale: Smallest scale allowed: a number, or one for each output channel.

    Returns:
      Codes and scale.

    Raises:
      ValueError: If `bits` is out of range or the kernel is not finite.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization import quantize_min_max
      >>> kernel = np.array([[0.0, 12.0], [-1.0, 8.0], [0.4, -2.0]])
      >>> quantize_min_max(kernel, bits=3).codes.tolist()
      [[0, 3], [-3, 2], [1, 0]]
      >>> quantize_min_max(kernel, bits=3, per_channel=False).scale.tolist()
      [4.0]
    """
    return round_to_grid(kernel, largest_magnitude(kernel, per_channel), bits, min_scale)


def largest_magnitude(kernel: np.ndarray, per_channel: bool) -> np.ndarray:
    """The largest absolute weight of each output channel or of the tensor, of shape [channels] or [1].

    Args:
      kernel: Float weights, [..., output channels].
      per_channel: Whether to treat every output channel on its own.
    """
    magnitude = np.abs(np.asarray(kernel, np.float32))
    return np.max(magnitude, axis=tuple(range(magnitude.ndim - 1))) if per_channel else np.max(magnitude).reshape(1)


def round_to_grid(
    kernel: np.ndarray, largest: np.ndarray, bits: int, min_scale: float | np.ndarray = 0.0
) -> QuantizedKernel:
    """Rounds a kernel to the grid whose largest code represents `largest`; weights beyond it are clipped.

    Args:
      kernel: Float weights, [..., output channels].
      largest: Largest weight that is not clipped, of shape [output channels] or [1].
      bits: Bits of a weight, from 2 to 8.
      min_scale: Smallest scale allowed: a number, or one for each output channel.

    Returns:
      Codes and scale.

    Raises:
      ValueError: If `bits` is out of range or the kernel is not finite.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(
            f"weight bits are {bits!r}; they must be a whole number from {WEIGHT_BITS[0]} to {WEIGHT_BITS[-1]}"
        )
    kernel = np.asarray(kernel, np.float32)
    if not np.all(np.isfinite(kernel)):
        raise ValueError("the kernel holds infinities or NaN; was training stable?")
    limit = largest_code(bits)
    scale = largest / limit
    # An all-zero channel needs some scale; the largest one makes its bias as fine as that of its neighbours.
    scale = np.where(scale > 0, scale, np.max(scale) if np.max(scale) > 0 else 1.0)
    scale = raise_scale(scale, min_scale)
    codes = np.clip(np.round(kernel / scale), -limit, limit)
    return QuantizedKernel(codes.astype(np.int8), scale)


def raise_scale(scale: np.ndarray, min_scale: float | np.ndarray) -> np.ndarray:
    """Raises scales that are below a minimum.

    Args:
      scale: Scales of shape [1] or [output channels].
      min_scale: Smallest scale allowed: a number, or one for each output channel.

    Returns:
      The raised scales, float32, in the shape of `scale`.
    """
    return np.maximum(scale, np.max(min_scale) if len(scale) == 1 else min_scale).astype(np.float32)


def min_scale_of_bias(bias: np.ndarray, input_scale: float) -> np.ndarray:
    """The weight scale of each output channel below which its bias overflows 32 bits.

    Args:
      bias: Bias in float, [output channels].
      input_scale: Scale of the layer's inputs.
    """
    # Slightly above the exact limit, since float32 rounds the product of the scales.
    return 1.001 * np.abs(bias) / (input_scale * MAX_BIAS_CODE)
