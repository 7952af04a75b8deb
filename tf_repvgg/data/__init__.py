"""Image classification sets through TFDS, as tf.data pipelines."""

from tf_repvgg.data.classification import ClassificationData, Preprocessing
from tf_repvgg.data.digits import Digits

__all__ = ["ClassificationData", "Digits", "Preprocessing"]
