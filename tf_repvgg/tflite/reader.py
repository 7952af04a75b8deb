"""Contents of a TFLite file: operators, weight codes, metadata."""

from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tf_repvgg.quantization.uniform import QuantizedKernel
from tf_repvgg.tflite import flatbuffer

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


class Operator(NamedTuple):
    """One operator of a file.

    Attributes:
      name: Name of the operator in TFLite's schema, such as "CONV_2D".
      version: Version of the operator.
      output_shape: Shape of its first output; empty for an operator without outputs.

    Example:
      >>> from tf_repvgg.tflite import Operator
      >>> Operator("CONV_2D", version=3, output_shape=(1, 8, 8, 4)).name
      'CONV_2D'
    """

    name: str
    version: int
    output_shape: tuple[int, ...]


def operators(file: bytes) -> list[Operator]:
    """The operators of a file, in execution order.

    Raises:
      ValueError: If the file is not a TFLite file.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
      >>> for operator in tflite.operators(tflite.convert(model, calibration=np.ones([1, 8, 8, 3]))):
      ...     print(operator.name, operator.output_shape)
      CONV_2D (1, 6, 6, 4)
      RESHAPE (1, 144)
    """
    flat = flatbuffer.unpack(file)
    return [
        Operator(
            _NAMES.get(code := flatbuffer.operator_code(flat, operator), f"operator {code}"),
            flat.operatorCodes[operator.opcodeIndex].version,
            flatbuffer.tensor_shape(graph.tensors[operator.outputs[0]])
            if operator.outputs is not None and len(operator.outputs)
            else (),
        )
        for graph in flat.subgraphs
        for operator in graph.operators
    ]


def weight_codes(file: bytes) -> list[QuantizedKernel]:
    """The weights of every operator that has some, in execution order.

    Returns:
      Codes and scales; output channels are last, see `QuantizedKernel`.

    Raises:
      ValueError: If the file is not a TFLite file.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> (kernel,) = tflite.weight_codes(tflite.convert(model, calibration=np.ones([1, 8, 8, 3]), weight_bits=4))
      >>> kernel.codes.shape, int(kernel.codes.max()), kernel.scale.shape
      ((3, 3, 3, 4), 7, (4,))
    """
    flat = flatbuffer.unpack(file)
    kernels = []
    for graph in flat.subgraphs:
        for operator in graph.operators:
            if (layout := flatbuffer.weights_layout(flat, operator)) is not None:
                weights = flatbuffer.weights_tensor(graph, operator)
                if not flatbuffer.is_constant(flat, weights):
                    continue
                codes = flatbuffer.weight_codes(flat, weights, layout)
                kernels.append(QuantizedKernel(codes, np.asarray(weights.quantization.scale, np.float32)))
    return kernels


def entropy_bits(codes: np.ndarray) -> float:
    """Entropy of the distribution of codes, in bits."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-np.sum(shares * np.log2(shares)))


def distinct_codes(codes: np.ndarray, is_per_channel: bool) -> int:
    """Number of distinct codes of a tensor; per channel, that of the channel with the most.

    Args:
      codes: Codes of any shape, output channels last.
      is_per_channel: Whether each output channel counts alone.
    """
    columns = codes.reshape(-1, codes.shape[-1]).T if is_per_channel else [codes]
    return max(len(np.unique(column)) for column in columns)


def metadata(file: bytes, name: str) -> bytes | None:
    """The content of a named metadata block of a file; None if there is no block of that name.

    Raises:
      ValueError: If the file is not a TFLite file.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> file = tflite.convert(model, calibration=np.ones([1, 8, 8, 3]), metadata={"labels": ["cat", "dog"]})
      >>> tflite.metadata(file, tflite.METADATA_NAME)
      b'{"labels": ["cat", "dog"]}'
    """
    flat = flatbuffer.unpack(file)
    for entry in flat.metadata or []:
        if entry.name in (name, name.encode()):
            return np.asarray(flat.buffers[entry.buffer].data, np.uint8).tobytes()
    return None
