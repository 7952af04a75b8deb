"""Parts of images that a layer learns from: kernels learn from pixels, and large images hold more than a step needs."""

from typing import Any

import numpy as np
import tf_keras as keras

# Images of a step: fewer where outputs have many pixels.
_BATCH, _SMALLEST_BATCH, _PIXELS = 32, 8, 1024
# Where outputs have more pixels than `_LARGEST`, windows of this side stand for the images.
_SIDE, _LARGEST = 16, 1024


class Windows:
    """Random batches of a layer's inputs and outputs: whole images, or a window of each where images are large.

    Args:
      layer: Layer of `WEIGHTED_LAYERS`.
      inputs: Inputs [images, ...] of the layer.
      expected: Outputs [images, ...] of the layer that is to be reproduced.
      images: Indices of the images to draw from.
      generator: Source of random draws.

    Attributes:
      layer: Layer that computes outputs from the inputs that `draw` returns: `layer`, or a copy of it without padding.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.ptq.windows import Windows
      >>> inputs = np.ones([4, 64, 64, 3], np.float32)
      >>> layer = keras.layers.Conv2D(5, 3, padding="same")
      >>> windows = Windows(layer, inputs, layer(inputs).numpy(), np.arange(4), np.random.default_rng(0))
      >>> [part.shape for part in windows.draw()]
      [(32, 18, 18, 3), (32, 16, 16, 5)]
    """

    def __init__(
        self,
        layer: Any,
        inputs: np.ndarray,
        expected: np.ndarray,
        images: np.ndarray,
        generator: np.random.Generator,
    ) -> None:
        self._inputs, self._expected, self._images, self._generator = inputs, expected, images, generator
        pixels = int(np.prod(expected.shape[1:-1]))
        self._are_whole = pixels <= _LARGEST or not _reads_windows(layer)
        if self._are_whole:
            self.layer, self._batch = layer, min(max(_PIXELS // pixels, _SMALLEST_BATCH), _BATCH, len(images))
            return
        self.layer, self._batch = type(layer).from_config(layer.get_config() | {"padding": "valid"}), _BATCH
        self.layer.build(inputs.shape)
        # Pixels from the first to the last that a kernel reads.
        reaches = [(size - 1) * rate + 1 for size, rate in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
        axes = list(zip(inputs.shape[1:3], expected.shape[1:3], layer.strides, reaches, strict=True))
        self._size = [min(_SIDE, outputs) for outputs in expected.shape[1:3]]
        self._input_size = [
            (size - 1) * stride + reach for size, (_, _, stride, reach) in zip(self._size, axes, strict=True)
        ]
        self._padding = [
            max((outputs - 1) * stride + reach - size, 0) // 2 if layer.padding == "same" else 0
            for size, outputs, stride, reach in axes
        ]

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """A batch of inputs, and of the outputs that `layer` should compute from them."""
        indices = self._images[self._generator.integers(0, len(self._images), self._batch)]
        if self._are_whole:
            return self._inputs[indices], self._expected[indices]
        last = np.subtract(self._expected.shape[1:3], self._size)
        corners = self._generator.integers(0, last + 1, (len(indices), 2))
        starts = corners * self.layer.strides - self._padding
        return _cut(self._inputs, indices, starts, self._input_size), _cut(self._expected, indices, corners, self._size)


def _reads_windows(layer):
    """Whether a window of outputs follows from a window of inputs alone."""
    is_convolution = isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    is_plain = is_convolution and not isinstance(layer, keras.layers.Conv2DTranspose)
    return is_plain and layer.data_format == "channels_last"


def _cut(images, indices, corners, size):
    """A window of each of these images [count, height, width, channels], with zeros beyond the borders."""
    windows = np.zeros([len(indices), *size, images.shape[-1]], images.dtype)
    for window, index, (top, left) in zip(windows, indices, corners, strict=True):
        image = images[index, max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
        row, column = max(-top, 0), max(-left, 0)
        window[row : row + image.shape[0], column : column + image.shape[1]] = image
    return windows
