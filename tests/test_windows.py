"""Windows of large images: a layer computes from them what it computes there from whole images."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images

from tf_repvgg.quantization.ptq.windows import Windows
from tf_repvgg.quantization.quantized_layers import apply_kernel, kernel_of

LAYERS = {
    "same": keras.layers.Conv2D(3, 3, padding="same"),
    "stride": keras.layers.Conv2D(3, 4, 2, padding="same"),
    "dilation, groups": keras.layers.Conv2D(4, (1, 5), dilation_rate=(1, 3), groups=2, padding="same"),
    "valid": keras.layers.Conv2D(3, 5, 2),
    "depthwise": keras.layers.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2),
    "transposed": keras.layers.Conv2DTranspose(3, 3, 2),
    "pixels": keras.layers.Dense(3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_of_windows_are_those_of_the_images(kind):
    layer, images = LAYERS[kind], random_images(2, (130, 75, 4))
    expected = layer(images).numpy()
    windows = Windows(layer, images, expected, np.array([1]), np.random.default_rng(0))
    inputs, outputs = windows.draw()
    is_cut = kind not in ("transposed", "pixels")
    assert outputs.shape[1:3] == ((16, 16) if is_cut else expected.shape[1:3])
    np.testing.assert_allclose(apply_kernel(windows.layer, inputs, kernel_of(layer)), outputs, atol=1e-5)
