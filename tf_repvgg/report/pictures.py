"""Images of a dataset as data URIs."""

import base64
import io
from collections.abc import Iterable

from PIL import Image

from tf_repvgg.data import ClassificationData


def read_pictures(data: ClassificationData, split: str, indices: Iterable[int]) -> dict[int, str]:
    """Reads images of a split.

    Args:
      data: Dataset.
      split: "train", "validation" or "test".
      indices: Places of the images in the split.

    Returns:
      {index: data URI of a PNG}.
    """
    missing = set(indices)
    pictures: dict[int, str] = {}
    for index, (image, _) in enumerate(data.images(split).as_numpy_iterator()):
        if not missing:
            break
        if index in missing:
            missing.remove(index)
            pictures[index] = _make_data_uri(image)
    return pictures


def _make_data_uri(image):
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
