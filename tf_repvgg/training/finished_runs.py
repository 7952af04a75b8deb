"""Models of finished runs, and the data that they are for."""

import tf_keras as keras

from tf_repvgg import fusion, runs
from tf_repvgg.data import Preprocessing


def load_matching(path, data, role: str) -> keras.Model:
    """The model of a finished run whose images and classes are those of `data`.

    Args:
      path: workdir of the run, or its model.keras.
      data: what is trained on now, `tf_repvgg.data.ClassificationData`.
      role: what the model is to the new run, for messages: "teacher".

    Raises:
      FileNotFoundError: if there is no finished run.
      ValueError: if its model expects other images or knows other classes.
    """
    facts = runs.read_input(path)
    model = runs.load_model(path)
    labels = tuple(facts.get("labels", data.labels))
    if labels != data.labels or model.output_shape[-1] != data.num_classes:
        raise ValueError(
            f"{role} {str(path)!r} tells {model.output_shape[-1]} classes apart ({_few(labels)}), but {data.name!r} "
            f"has {data.num_classes} ({_few(data.labels)}); use one that was trained on the same classes"
        )
    expected = Preprocessing.from_facts(facts)
    if expected != data.preprocessing or model.input_shape[-1] != data.channels:
        raise ValueError(
            f"{role} {str(path)!r} expects images of {model.input_shape[-1]} channels by {expected}, but this run "
            f"trains on {data.channels} channels by {data.preprocessing}; use the same input for both"
        )
    return model


def fused(model: keras.Model, path, role: str) -> keras.Model:
    """The model of `load_matching` with every block as one convolution; one that is fused already, as it is.

    Raises:
      ValueError: if its weights are not finite.
    """
    if not fusion.needs_fusing(model):
        return model
    try:
        return fusion.fuse(model)
    except ArithmeticError as error:
        raise ValueError(f"{role} {str(path)!r} cannot be fused: {error}; was its training stable?") from None


def check_fits(model: keras.Model, data) -> None:
    """
    Raises:
      ValueError: if the model is for images of another shape, or another number of classes, than `data` has.
    """
    expected, found = (model.input_shape[1:], model.output_shape[-1]), (data.image_shape, data.num_classes)
    if expected != found:
        raise ValueError(
            "the model takes images {} into {} classes, but ".format(*expected)
            + "{name} has images {} of {} classes".format(*found, name=repr(data.name))
        )


def _few(labels):
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
