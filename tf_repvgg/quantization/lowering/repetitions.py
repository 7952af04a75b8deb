"""Equal ReLUs of one tensor, which the converter computes once: it then fuses them with the layer before."""

from collections.abc import Callable
from typing import Any

import tf_keras as keras

from tf_repvgg.quantization.lowering.operator_rules import is_operator

_LIMITS = {"relu": None, "relu6": 6.0}


class ReluCalls:
    """The calls of ReLUs in a model, each made once.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.lowering.repetitions import ReluCalls
      >>> features, calls = keras.Input([4]), ReluCalls()
      >>> relus = keras.layers.ReLU(), keras.layers.Activation("relu")
      >>> first, second = (calls.share(layer, layer) for layer in relus)
      >>> first(features) is second(features), calls.is_any_shared
      (True, True)
    """

    def __init__(self) -> None:
        self._outputs: dict[tuple[Any, ...], Any] = {}
        self.is_any_shared = False

    def share(self, layer: keras.layers.Layer, call: Callable) -> Callable:
        """Makes what calls a layer only if no equal one has been called on the same tensor; `call` for other layers.

        Args:
          layer: Any layer.
          call: What takes its place, a callable that takes the arguments of the layer's calls.
        """
        function = _find_function(layer)
        if function is None:
            return call

        def call_once(inputs, **keywords):
            key = *function, inputs.ref()
            if key in self._outputs:
                self.is_any_shared = True
            else:
                self._outputs[key] = call(inputs, **keywords)
            return self._outputs[key]

        return call_once


def _find_function(layer):
    """(limit, slope, threshold) of a ReLU; None for other layers."""
    if type(layer) is keras.layers.ReLU:
        limit = None if layer.max_value is None else float(layer.max_value)
        return limit, float(layer.negative_slope), float(layer.threshold)
    if type(layer) is keras.layers.Activation:
        name = getattr(layer.activation, "__name__", None)
    else:
        name = layer.symbol.rpartition(".")[2] if is_operator(layer) else None
    return (_LIMITS[name], 0.0, 0.0) if name in _LIMITS else None
