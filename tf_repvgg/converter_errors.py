"""Errors of TensorFlow's converter and of LiteRT in one line: the operation, the reason, and what to use instead."""

import re
from typing import Any

import numpy as np

# The operation's name is TensorFlow's or TFLite's own: 'tf.Erf', 'tfl.prelu'. The error of a file comes first.
_REFUSED_OPERATION = re.compile(r"error: '(tf|tfl)\.(\w+)' op (.*)")
_NO_16_BIT_FORM = re.compile(r"Quantization to 16x8-bit not yet supported for op: '(\w+)'")
_ANY_ERROR = re.compile(r"error: (.*)")
_LITERT_NODE = re.compile(r"(.*?)\s*Node number (\d+) \((\w+)\) failed to (\w+)", re.DOTALL)
_SOURCE_LINE = re.compile(r"^\S*\.(?:cc|h):\d+ ")
_LONGEST_REASON = 200

# {operation in lower case, without underscores: what computes nearly the same}
_REPLACEMENTS = {
    "erf": "keras.activations.gelu with approximate=True, or tanh",
    "erfc": "tanh",
    "extractimagepatches": "a convolution with strides",
    "maxpoolwithargmax": "MaxPooling2D",
    "prelu": "LeakyReLU or ReLU",
    "gelu": "swish or ReLU",
    "hardswish": "swish or ReLU6",
    "elu": "ReLU or swish",
    "matrixinverse": "an inverse that is computed beforehand",
    "resizebicubic": "bilinear or nearest resizing",
    "l2normalization": "a normalization outside of the model",
}


def explain_conversion(error: Exception, activation_bits: int = 8) -> str:
    """Explains an error of TensorFlow's converter in one line.

    Args:
      error: Error that `convert` has raised.
      activation_bits: Bits of the activations that the converter was to write.

    Example:
      >>> from tf_repvgg.converter_errors import explain_conversion
      >>> error = RuntimeError("Quantization to 16x8-bit not yet supported for op: 'PRELU'.")
      >>> print(explain_conversion(error, activation_bits=16))
      TFLite's PRELU has no form with 16-bit activations; use LeakyReLU or ReLU instead, or 8-bit activations
    """
    text = str(error)
    if match := _NO_16_BIT_FORM.search(text):
        return _explain_16_bits(match[1])
    if match := _REFUSED_OPERATION.search(text):
        dialect, operation, reason = match.groups()
        if dialect == "tf":
            return f"TFLite has no operation {operation}; use {_find_replacement(operation, 'operations of TFLite')}"
        if activation_bits == 16:
            return _explain_16_bits(operation.upper())
        return (
            f"TensorFlow's converter refuses the operation {operation.upper()} ({_shorten(reason)!r}); use "
            f"{_find_replacement(operation, 'another operation')}"
        )
    if match := _LITERT_NODE.match(text):  # the converter runs a file on calibration samples
        return explain_run(text)
    match = _ANY_ERROR.search(text)
    reason = _shorten(match[1] if match else text)
    return f"TensorFlow's converter cannot write the model: {reason}; use plain layers, without a state of their own"


def allocate_tensors(interpreter: Any) -> None:
    """Allocates the tensors of LiteRT's interpreter, which prepares every operation of its file.

    Raises:
      ValueError: If an operation cannot be prepared. The message names it.
    """
    try:
        interpreter.allocate_tensors()
        return
    except RuntimeError as error:
        text = str(error)
    is_16_bit = any(details["dtype"] == np.int16 for details in interpreter.get_tensor_details())
    raise ValueError(explain_run(text, is_16_bit))


def explain_run(text: str, is_16_bit: bool = False) -> str:
    """Explains an error of LiteRT when it loads or runs a file, in one line.

    Args:
      text: Message of the error.
      is_16_bit: Whether the file has 16-bit activations.

    Example:
      >>> from tf_repvgg.converter_errors import explain_run
      >>> print(explain_run("tflite/add.cc:57 sizes are not equal.Node number 2 (ADD) failed to prepare."))
      LiteRT cannot prepare the operation ADD (number 2 of the file): sizes are not equal
    """
    match = _LITERT_NODE.match(text)
    if match is None:
        return f"LiteRT cannot run the file: {_shorten(text)}"
    reason, number, operation, step = match.groups()
    if "unresolved custom op" in reason or operation.startswith("Flex"):
        return (
            f"the file needs the operation {operation.removeprefix('Flex')}, which LiteRT does not have; convert the "
            "model with operations of TFLite only"
        )
    advice = ""
    if is_16_bit:
        replacement = _REPLACEMENTS.get(_normalize(operation))
        advice = f"; use {replacement} instead, or 8-bit activations" if replacement else "; use 8-bit activations"
    return f"LiteRT cannot {step} the operation {operation} (number {number} of the file): {_shorten(reason)}{advice}"


def _explain_16_bits(operation):
    replacement = _find_replacement(operation, "another operation")
    return f"TFLite's {operation} has no form with 16-bit activations; use {replacement}, or 8-bit activations"


def _find_replacement(operation, default):
    return f"{_REPLACEMENTS.get(_normalize(operation), default)} instead"


def _normalize(operation):
    return operation.lower().replace("_", "")


def _shorten(reason):
    line = _SOURCE_LINE.sub("", " ".join(reason.split())).rstrip(".")
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
