"""Adding layers in place of one that integer files do not have, under names that no other layer has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tf_keras as keras

from tf_repvgg.quantization.lowering.affine import Affine, ChannelAffine


class Names:
    """Names of layers that are taken.

    Args:
      reserved: Names of the layers of the model that is lowered.
    """

    def __init__(self, reserved: set[str]) -> None:
        self._reserved = reserved
        self._used: set[str] = set()

    def claim(self, base: str, owner: str) -> str:
        """A free name that starts with `base`.

        Args:
          base: Name to start with.
          owner: Name of the layer that is replaced, which the replacement may have.
        """
        number, name = 0, base
        while name in self._used or (name in self._reserved and name != owner):
            number += 1
            name = f"{base}_{number}"
        self._used.add(name)
        return name


class Builder:
    """Builds what takes the place of one layer.

    Args:
      names: Names that are taken.
      owner: Name of the layer.
    """

    def __init__(self, names: Names, owner: str) -> None:
        self._names = names
        self.owner = owner

    def claim(self, name: str) -> str:
        """A free name, `name` itself if that is free."""
        return self._names.claim(name, self.owner)

    def layer(self, layer_class: type[Any], inputs: Any, name: str, **config: Any) -> Any:
        """Outputs of a new layer of a class."""
        return layer_class(name=self.claim(name), **config)(inputs)

    def relu(self, inputs: Any, name: str, limit: float | None = None) -> Any:
        """ReLU, or with a limit of 6 ReLU6."""
        return self.layer(keras.layers.ReLU, inputs, name, max_value=limit)

    def affine(self, inputs: Any, name: str, factor: Any = 1.0, offset: Any = 0.0) -> Any:
        """inputs * factor + offset, with numbers or arrays [channels]."""
        channels = inputs.shape[-1]
        affine = Affine(*(np.broadcast_to(np.asarray(value, np.float64), [channels]) for value in (factor, offset)))
        if np.all(affine.factor == 1) and not np.any(affine.offset):
            return inputs
        return ChannelAffine(affine, self.claim(name))(inputs)

    def chain(self, layer_class: type[Any], inputs: Sequence[Any], name: str) -> Any:
        """Outputs of layers of a class that merges tensors, two at a time, as operators of integer files do."""
        result, *others = inputs
        for number, tensor in enumerate(others, start=1):
            last = number == len(others)
            result = self.layer(layer_class, [result, tensor], name if last else f"{name}_part{number}")
        return result
