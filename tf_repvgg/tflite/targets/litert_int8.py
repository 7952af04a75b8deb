"""LiteRT: the integer file as it is."""

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.targets.base import Built, integer_weights


def build(file: bytes) -> Built:
    """Adds no file to the integer file itself.

    Raises:
      ValueError: If the file is not fully integer.
    """
    weight_bytes = sum(weights.codes.size for weights in integer_weights(flatbuffer.unpack(file)))
    return Built({}, {"int8_weight_bytes": weight_bytes, "file_bytes": len(file)})
