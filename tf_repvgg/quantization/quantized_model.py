"""The model that post-training quantization returns."""

from collections.abc import Iterable, Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg import graph


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QuantizedModel(keras.Model):
    """Functional model of `QuantizedLayer`s and `ActivationQuantizer`s, with notes that are saved and loaded with it.

    Attributes:
      quantization_notes: Lines for the user on what the methods left out or undid.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization import QuantizedModel
      >>> plain = keras.Sequential([keras.layers.ReLU(input_shape=(8, 8, 3))])
      >>> model = QuantizedModel.from_model(plain, ["nothing to quantize"])
      >>> keras.models.clone_model(model).quantization_notes
      ('nothing to quantize',)
    """

    # Not an argument of __init__: Keras treats subclasses as functional only if they have its own constructor.
    _notes: tuple[str, ...] = ()

    @classmethod
    def from_model(cls, model: keras.Model, notes: Iterable[str]) -> "QuantizedModel":
        """Makes a quantized model from the tensors and layers of a functional model, which stays as it is.

        Args:
          model: Functional model.
          notes: Lines of `quantization_notes`.
        """
        result = graph.recast(model, cls)
        result._notes = tuple(notes)
        return result

    @property
    def quantization_notes(self) -> tuple[str, ...]:
        """Lines for the user on what the methods left out or undid."""
        return tuple(self._notes)  # Keras wraps tuples that are set as attributes

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantization_notes": list(self._notes)}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "QuantizedModel":
        config = dict(config)
        notes = config.pop("quantization_notes")
        return cls.from_model(keras.Model.from_config(config, custom_objects), notes)


# H5 files and SavedModels name a model's class without its package.
keras.saving.get_custom_objects()[QuantizedModel.__name__] = QuantizedModel
