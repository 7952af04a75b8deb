"""Image classification sets, from TFDS or a folder, as tf.data pipelines."""

from tf_repvgg.data.classification import ClassificationData
from tf_repvgg.data.digits import Digits
from tf_repvgg.data.image_folder import ImageFolder
from tf_repvgg.data.preprocessing import NORMALIZATIONS, Preprocessing

__all__ = ["NORMALIZATIONS", "ClassificationData", "Digits", "ImageFolder", "Preprocessing"]
