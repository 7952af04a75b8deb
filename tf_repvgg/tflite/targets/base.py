"""Results of building for a target, and functions that targets share."""

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer


class Built(NamedTuple):
    """The result of building an integer file for one target.

    Attributes:
      files: {suffix of the file name, such as "_int4.tflite": content}; empty if the target adds no file.
      record: Measurements and notes for export.json, with units in the keys.
      predict: Function from images to logits that runs the target's own interpreter; None if there is none here.
      predict_int8: Function from images to logits that runs the int8 file on the same kernels as `predict`.
      in_litert: File that LiteRT runs differently from the int8 file, so that its latency is of interest.

    Example:
      >>> from tf_repvgg.tflite.targets import Built
      >>> Built(files={"_edgetpu.tflite": b"TFL3"}, record={"file_bytes": 4}).predict is None
      True
    """

    files: dict[str, bytes]
    record: dict[str, Any]
    predict: Callable[[np.ndarray], Any] | None = None
    predict_int8: Callable[[np.ndarray], Any] | None = None
    in_litert: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weight tensor of a file.

    Attributes:
      name: Name of the tensor, "<layer>/kernel" in files of this package.
      index: Index of the tensor in its subgraph.
      tensor: The tensor itself.
      codes: Codes, int8, output channels last.
      layout: Layout of the tensor.
    """

    name: str
    index: int
    tensor: schema.TensorT
    codes: np.ndarray
    layout: flatbuffer.WeightsLayout

    @property
    def is_per_channel(self) -> bool:
        """Whether each output channel has a scale of its own."""
        return len(self.tensor.quantization.scale) > 1


def integer_weights(model: schema.ModelT) -> list[Weights]:
    """The weight tensors of a file's main graph, each once.

    Raises:
      ValueError: If there are none, or one is not int8; names it.
    """
    graph, weights = model.subgraphs[0], {}
    for operator in graph.operators:
        if (layout := flatbuffer.weights_layout(model, operator)) is None:
            continue
        index = int(operator.inputs[flatbuffer.WEIGHTS_INPUT])
        tensor = graph.tensors[index]
        if not flatbuffer.is_constant(model, tensor):
            continue
        name = flatbuffer.tensor_name(tensor)
        if tensor.type != schema.TensorType.INT8:
            raise ValueError(f"the weights {name!r} are not int8; this target needs a fully integer file")
        weights[index] = Weights(name, index, tensor, flatbuffer.weight_codes(model, tensor, layout), layout)
    if not weights:
        raise ValueError("the file holds no convolution and no dense layer with int8 weights")
    return list(weights.values())


def optional_module(name: str, package: str) -> types.ModuleType:
    """Imports a module of an optional package.

    Args:
      name: Name of the module.
      package: Name of the package in the message.

    Raises:
      ValueError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this target needs {package}; install it with: pip install 'tf_repvgg[targets]'") from None
