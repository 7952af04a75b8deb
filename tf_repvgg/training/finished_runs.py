"""Models of finished runs, and whether they fit the data of a new one."""

from pathlib import Path

import tf_keras as keras

from tf_repvgg import fusion, runs
from tf_repvgg.data import ClassificationData, Preprocessing


def load_matching(path: str | Path, data: ClassificationData, role: str, trust_model: bool = False) -> keras.Model:
    """Loads the model of a finished run that was trained on the images and classes of `data`.

    Args:
      path: Folder of the run, or its model file.
      data: Data of the new run.
      role: Role of the model in the new run, for messages: "teacher".
      trust_model: Whether the model file may run code; see `runs.load_model`.

    Raises:
      FileNotFoundError: If there is no finished run.
      ValueError: If the model expects other images or knows other classes, or its file could run code.
    """
    metadata = runs.read_input(path)
    model = runs.load_model(path, trust_model)
    labels = tuple(metadata.get("labels", data.labels))
    if labels != data.labels or model.output_shape[-1] != data.num_classes:
        raise ValueError(
            f"{role} {str(path)!r} distinguishes {model.output_shape[-1]} classes ({_abbreviate(labels)}), but "
            f"{data.name!r} has {data.num_classes} ({_abbreviate(data.labels)}); use a {role} that was trained on the "
            "same classes"
        )
    preprocessing = Preprocessing.from_metadata(metadata)
    if preprocessing != data.preprocessing or model.input_shape[-1] != data.channels:
        raise ValueError(
            f"{role} {str(path)!r} expects images with {model.input_shape[-1]} channels and {preprocessing}, but this "
            f"run trains on images with {data.channels} channels and {data.preprocessing}; use the same input for both"
        )
    return model


def fuse_if_needed(model: keras.Model, path: str | Path, role: str) -> keras.Model:
    """Fuses a model that `load_matching` has loaded; returns a model without blocks to fuse as it is.

    Args:
      model: Model in training form or fused.
      path: Folder of the model's run, for messages.
      role: Role of the model in the new run, for messages: "teacher".

    Raises:
      ValueError: If its weights are not finite.
    """
    if not fusion.needs_fusing(model):
        return model
    try:
        return fusion.fuse(model)
    except ArithmeticError as error:
        raise ValueError(f"{role} {str(path)!r} cannot be fused: {error}; did its training diverge?") from None


def check_fits(model: keras.Model, data: ClassificationData) -> None:
    """Checks that a model takes the images of `data`, of their size or of any, and distinguishes as many classes.

    Raises:
      ValueError: If it does not.
    """
    expected, actual = (model.input_shape[1:], model.output_shape[-1]), (data.image_shape, data.num_classes)
    taken_sizes = [other if size is None else size for size, other in zip(expected[0], actual[0], strict=False)]
    if len(expected[0]) != len(actual[0]) or taken_sizes != list(actual[0]) or expected[1] != actual[1]:
        raise ValueError(
            "the model takes images of shape {} and distinguishes {} classes, ".format(*expected)
            + "but {name!r} has images of shape {} and {} classes".format(*actual, name=data.name)
        )


def _abbreviate(labels):
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
