"""Layers of sequences as layers of images that are one pixel wide."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras as keras

_LAYERS_OF_IMAGES = {
    keras.layers.AveragePooling1D: keras.layers.AveragePooling2D,
    keras.layers.Conv1D: keras.layers.Conv2D,
    keras.layers.Conv1DTranspose: keras.layers.Conv2DTranspose,
    keras.layers.Cropping1D: keras.layers.Cropping2D,
    keras.layers.GlobalMaxPooling1D: keras.layers.GlobalMaxPooling2D,
    keras.layers.MaxPooling1D: keras.layers.MaxPooling2D,
    keras.layers.UpSampling1D: keras.layers.UpSampling2D,
    keras.layers.ZeroPadding1D: keras.layers.ZeroPadding2D,
}
SEQUENCE_LAYERS = tuple(_LAYERS_OF_IMAGES)
# Arguments that have one entry for each dimension of an image, and the entry of its width.
_WIDTH: dict[str, Any] = {
    "cropping": (0, 0),
    "dilation_rate": 1,
    "kernel_size": 1,
    "output_padding": 0,
    "padding": (0, 0),
    "pool_size": 1,
    "size": 1,
    "strides": 1,
}


def as_layer_of_images(layer: keras.layers.Layer, name: str, claim: Callable[[str], str], **changes: Any) -> Callable:
    """Makes what computes a layer of `SEQUENCE_LAYERS`, a callable on Keras tensors [batch, steps, channels].

    Args:
      layer: Layer with the channels last.
      name: Name of the layer of images.
      claim: Function that makes further names unique.
      **changes: Changes to the layer's configuration.
    """
    config = layer.get_config() | {"dtype": layer.variable_dtype, "name": name} | changes
    for field, width in _WIDTH.items():
        if config.get(field) is not None and not isinstance(config[field], str):
            (length,) = config[field] if np.ndim(config[field]) == np.ndim(width) + 1 else (config[field],)
            config[field] = length, width
    padding = None
    if config.get("padding") == "causal":
        past = (config["kernel_size"][0] - 1) * config["dilation_rate"][0]
        padding = keras.layers.ZeroPadding2D(((past, 0), (0, 0)), name=claim(f"{name}_past"))
        config["padding"] = "valid"
    layer_of_images = _LAYERS_OF_IMAGES[type(layer)].from_config(config)
    weights = [weight[:, np.newaxis] if weight.ndim == 3 else weight for weight in layer.get_weights()]

    def call(inputs: Any, **_: Any) -> Any:
        images = keras.layers.Reshape((-1, 1, inputs.shape[-1]), name=claim(f"{name}_as_image"))(inputs)
        outputs = layer_of_images(images if padding is None else padding(images))
        layer_of_images.set_weights(weights)
        if len(outputs.shape) == 2:  # global pooling
            return outputs
        return keras.layers.Reshape((-1, outputs.shape[-1]), name=claim(f"{name}_as_sequence"))(outputs)

    return call
