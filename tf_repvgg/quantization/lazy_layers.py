"""Registers the layers of `qat` by name, so that models in training load after `import tf_repvgg` alone.

Their modules import tensorflow-model-optimization, which takes more than a second, so Keras gets a placeholder for each
class. Importing a module replaces the placeholders of its classes by the classes themselves.
"""

import importlib
from typing import Any

import tf_keras as keras

_MODULES = {
    "ClusterQuantize": "tf_repvgg.quantization.qat.clustering.wrapper",
    "ClusterQuantizeBlock": "tf_repvgg.quantization.qat.clustering.block",
    "LearnedStep": "tf_repvgg.quantization.qat.lsq",
}


class _LazyLayer:
    """Placeholder that imports the class of a layer when Keras makes one from its configuration."""

    def __init__(self, class_name: str) -> None:
        self._class_name = class_name

    def from_config(self, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> keras.layers.Layer:
        layer_class = getattr(importlib.import_module(_MODULES[self._class_name]), self._class_name)
        return layer_class.from_config(config, custom_objects=custom_objects)


def register() -> None:
    """Registers a placeholder for every class that is not imported yet."""
    for class_name in _MODULES:
        keras.saving.get_custom_objects().setdefault(f"tf_repvgg>{class_name}", _LazyLayer(class_name))
