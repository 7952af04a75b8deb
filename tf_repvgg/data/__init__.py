"""Datasets for image classification, from TFDS or a folder, as tf.data pipelines."""

from typing import TYPE_CHECKING, Any

from tf_repvgg.data.class_numbers import ClassNumbers
from tf_repvgg.data.classification import ClassificationData
from tf_repvgg.data.image_folder import ImageFolder
from tf_repvgg.data.preprocessing import NORMALIZATIONS, Preprocessing

if TYPE_CHECKING:
    from tf_repvgg.data.digits import Digits

__all__ = ["NORMALIZATIONS", "ClassNumbers", "ClassificationData", "Digits", "ImageFolder", "Preprocessing"]


def __getattr__(name: str) -> Any:
    """Imports `Digits` when it is first used: it is a class of TFDS, which takes seconds to import."""
    if name == "Digits":
        from tf_repvgg.data.digits import Digits

        return Digits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
