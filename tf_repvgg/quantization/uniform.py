"""Weights on a uniform, symmetric integer grid."""

import dataclasses

import numpy as np

# Granularities of weight scales and codebooks, as flags and files name them, and in words.
GRANULARITIES = {"per_tensor": "per tensor", "per_channel": "per channel"}
# Of symmetric int8 weights: the kernels of integer runtimes do not take -128.
LARGEST_CODE = 127
# Half of what 32 bits hold: an accumulator starts at the bias and needs room for the products.
MAX_BIAS_CODE = 2**30


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel as integer codes and scales: weight = code * scale.

    Attributes:
      codes: int8 array in the kernel's own layout, output channels last. A depthwise kernel counts as that of the
        grouped convolution it is: [height, width, 1, channels * depth multiplier].
      scale: float32, of shape [1] (per tensor) or [output channels].
    """

    codes: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """The float32 kernel that the codes stand for."""
        return self.codes.astype(np.float32) * self.scale


def quantize_min_max(kernel, bits=8, per_channel=True, min_scale=0.0) -> QuantizedKernel:
    """Rounds a kernel to codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1, the largest weight being the largest code.

    Args:
      kernel: float array [..., output channels].
      bits: 2 to 8.
      per_channel: one scale per output channel, or one for the tensor.
      min_scale: smallest scale allowed, a number or [output channels].

    Raises:
      ValueError: if `bits` is out of range or the kernel is not finite.
    """
    return round_to_grid(kernel, largest_magnitude(kernel, per_channel), bits, min_scale)


def largest_magnitude(kernel, per_channel) -> np.ndarray:
    """The largest |weight| of each output channel, or of the tensor: shape [channels] or [1]."""
    magnitude = np.abs(np.asarray(kernel, np.float32))
    return np.max(magnitude, axis=tuple(range(magnitude.ndim - 1))) if per_channel else np.max(magnitude).reshape(1)


def round_to_grid(kernel, largest, bits, min_scale=0.0) -> QuantizedKernel:
    """Rounds a kernel to the grid whose largest code stands for `largest`; weights beyond it are clipped.

    Args:
      kernel: float array [..., output channels].
      largest: float array [output channels] or [1].
      bits, min_scale: as for `quantize_min_max`, and the same errors.
    """
    if bits not in range(2, 9):
        raise ValueError(f"weight bits are {bits!r}; they must be a whole number from 2 to 8")
    kernel = np.asarray(kernel, np.float32)
    if not np.all(np.isfinite(kernel)):
        raise ValueError("the kernel holds infinities or NaN; was training stable?")
    largest_code = 2 ** (bits - 1) - 1
    scale = largest / largest_code
    # All-zero channels need some scale; any other channel's makes their bias as fine as its neighbours'.
    scale = np.where(scale > 0, scale, np.max(scale) if np.max(scale) > 0 else 1.0)
    scale = at_least(scale, min_scale)
    codes = np.clip(np.round(kernel / scale), -largest_code, largest_code)
    return QuantizedKernel(codes.astype(np.int8), scale)


def at_least(scale, min_scale) -> np.ndarray:
    """A scale of shape [1] or [output channels] as float32, raised to `min_scale`: a number or [output channels]."""
    return np.maximum(scale, np.max(min_scale) if len(scale) == 1 else min_scale).astype(np.float32)


def min_scale_of_bias(bias, input_scale) -> np.ndarray:
    """The weight scale below which a bias overflows its 32 bits, for each output channel."""
    # A hair above, as float32 rounds the product of the scales.
    return 1.001 * np.abs(bias) / (input_scale * MAX_BIAS_CODE)
