"""What every target makes of an integer file, and what targets share."""

import importlib
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.tflite import flatbuffer


class Built(NamedTuple):
    """One target's share of an export.

    Attributes:
      files: {suffix of the file name, such as "_int4.tflite": content}; empty where the target adds none.
      facts: what there is to say, JSON-serializable, with units in the keys.
      predict: images -> logits in the target's own interpreter; None where there is none here.
      predict_int8: the same for the int8 file, on the same kernels.
      in_litert: a file that LiteRT runs otherwise than the int8 file, so that its latency is of interest.
    """

    files: dict[str, bytes]
    facts: dict
    predict: Callable | None = None
    predict_int8: Callable | None = None
    in_litert: bytes | None = None


class Weights(NamedTuple):
    """A weight tensor of a file.

    Attributes:
      name: of the tensor.
      index: in its subgraph.
      tensor: of the schema.
      codes: int8, output channels last.
      layout: `flatbuffer.WeightsLayout`.
    """

    name: str
    index: int
    tensor: schema.TensorT
    codes: np.ndarray
    layout: flatbuffer.WeightsLayout

    @property
    def is_per_channel(self) -> bool:
        return len(self.tensor.quantization.scale) > 1


def integer_weights(model: schema.ModelT) -> list[Weights]:
    """The weight tensors of a file's main graph, each once.

    Raises:
      ValueError: if it has none, or they are not int8; names them.
    """
    graph, found = model.subgraphs[0], {}
    for operator in graph.operators:
        if (layout := flatbuffer.weights_layout(model, operator)) is None:
            continue
        index = int(operator.inputs[flatbuffer.WEIGHTS_INPUT])
        tensor = graph.tensors[index]
        name = tensor.name.decode()
        if tensor.type != schema.TensorType.INT8:
            raise ValueError(f"the weights {name!r} are not int8; this target needs a fully integer file")
        found[index] = Weights(name, index, tensor, flatbuffer.weight_codes(model, tensor, layout), layout)
    if not found:
        raise ValueError("the file holds no convolution and no dense layer with int8 weights")
    return list(found.values())


def optional_module(name: str, package: str) -> types.ModuleType:
    """Imports what an optional extra brings.

    Raises:
      ValueError: if it is not installed; tells how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this target needs {package}; install it with: pip install 'tf_repvgg[targets]'") from None
