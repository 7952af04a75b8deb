"""LiteRT: the integer file as it is."""

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.targets.base import Built, integer_weights


def build(file: bytes) -> Built:
    """Nothing is added to the file itself.

    Raises:
      ValueError: if it is not fully integer.
    """
    weights = integer_weights(flatbuffer.unpack(file))
    return Built({}, {"int8_weight_bytes": sum(each.codes.size for each in weights), "file_bytes": len(file)})
