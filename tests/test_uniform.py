"""The uniform grid: codes and scales follow from their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tf_repvgg.quantization import QuantizedKernel, quantize_min_max
from tf_repvgg.quantization.uniform import largest_code

kernels = hnp.arrays(
    np.float32,
    st.sampled_from([(3, 3, 4, 5), (1, 1, 2, 3), (7, 4)]),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@given(kernel=kernels, bits=st.integers(2, 8), per_channel=st.booleans())
def test_codes_are_the_nearest_of_the_grid(kernel, bits, per_channel):
    quantized = quantize_min_max(kernel, bits, per_channel)
    largest = 2 ** (bits - 1) - 1
    assert largest_code(bits) == largest
    assert quantized.codes.dtype == np.int8 and quantized.scale.dtype == np.float32
    assert quantized.codes.shape == kernel.shape
    assert quantized.scale.shape == ((kernel.shape[-1],) if per_channel else (1,))
    assert np.all(np.abs(quantized.codes.astype(int)) <= largest)
    assert np.all(quantized.scale > 0)
    error = np.abs(quantized.dequantize().astype(np.float64) - kernel)
    assert np.all(error <= 0.5 * quantized.scale * (1 + 1e-5) + 1e-30)
    # The largest weight of the tensor, or of each channel, is the largest code.
    groups = np.abs(kernel.reshape(-1, kernel.shape[-1]))
    codes = np.abs(quantized.codes.reshape(-1, kernel.shape[-1]).astype(int))
    if not per_channel:
        groups, codes = groups.reshape(-1, 1), codes.reshape(-1, 1)
    for column in range(groups.shape[1]):
        if groups[:, column].max() > 1e-30:
            assert codes[:, column].max() == largest
        else:
            assert codes[:, column].max() in (0, largest)


def test_by_hand():
    kernel = np.float32([[0.0, 10.0], [-1.0, 5.0], [0.4, -2.0]])
    quantized = quantize_min_max(kernel, 3)
    np.testing.assert_allclose(quantized.scale, [1 / 3, 10 / 3], rtol=1e-6)
    np.testing.assert_array_equal(quantized.codes, [[0, 3], [-3, 2], [1, -1]])
    quantized = quantize_min_max(kernel, 3, per_channel=False)
    np.testing.assert_array_equal(quantized.codes, [[0, 3], [0, 2], [0, -1]])
    np.testing.assert_allclose(quantized.dequantize(), [[0, 10], [0, 20 / 3], [0, -10 / 3]], rtol=1e-6)


def test_dead_channels_get_a_usable_scale():
    kernel = np.zeros((3, 3, 2, 3), np.float32)
    kernel[..., 1] = 0.5
    quantized = quantize_min_max(kernel, 8)
    assert np.all(quantized.codes[..., [0, 2]] == 0)
    np.testing.assert_allclose(quantized.scale, 0.5 / 127, rtol=1e-6)
    zeros = quantize_min_max(np.zeros((3, 3, 2, 2)), 4)
    assert np.all(zeros.codes == 0) and np.all(zeros.scale > 0)
    assert np.all(quantize_min_max(np.zeros((2, 2)), 4, per_channel=False).scale > 0)


def test_smallest_scale_does_not_replace_the_neighbours_scale_of_dead_channels():
    quantized = quantize_min_max(np.float32([[1.27, 0.0]]), 8, min_scale=np.float32([1e-9, 1e-9]))
    np.testing.assert_allclose(quantized.scale, [0.01, 0.01], rtol=1e-6)


def test_smallest_scale():
    kernel = np.float32([[1.0, 1e-9]])
    quantized = quantize_min_max(kernel, 8, min_scale=np.float32([1e-6, 1e-3]))
    np.testing.assert_allclose(quantized.scale, [1 / 127, 1e-3], rtol=1e-6)
    np.testing.assert_array_equal(quantized.codes, [[127, 0]])
    assert quantize_min_max(kernel, 8, per_channel=False, min_scale=np.float32([0, 0.1])).scale == np.float32([0.1])


@pytest.mark.parametrize("bits", [0, 1, 9, 16, 4.5, "8", None])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match=r"weight bits are .*whole number from 2 to 8"):
        quantize_min_max(np.ones((2, 2)), bits)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kernels_that_are_not_finite(value):
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_min_max(np.array([[1.0, value]]))


def test_dequantize():
    kernel = QuantizedKernel(np.int8([[1, -2], [3, 4]]), np.float32([0.5, 2]))
    np.testing.assert_array_equal(kernel.dequantize(), [[0.5, -4], [1.5, 8]])
    assert kernel.dequantize().dtype == np.float32
