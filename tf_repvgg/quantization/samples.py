"""Calibration samples: whatever a user gives for the inputs of a model becomes one array for each input and sample."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.input_scale import check_scale


class _Input(NamedTuple):
    name: str
    shape: tuple[int | None, ...]  # of one sample
    dtype: np.dtype


def read_samples(calibration: Any, model: keras.Model) -> list[list[np.ndarray]]:
    """Turns calibration data in any usual form into samples, each a batch of one for each input of the model.

    Args:
      calibration: For a model with one input: arrays of one image or of a batch of images; or an iterable of such
        arrays. For several inputs: a dictionary {input name: batch}, one batch for each input in a list, or an
        iterable of dictionaries or tuples. Further parts, as in `(image, label)` from a `tf.data.Dataset`, are left
        out. A function without arguments that returns such an iterable will do too.
      model: Functional model.

    Returns:
      The samples; each has an array [1, ...] for each of `model.inputs`, of the input's dtype.

    Raises:
      ValueError: If there are no samples, if one has another shape than the model's input, is not finite, or does not
        fit the input's dtype, if images are on another scale than the model expects (see
        `tf_repvgg.quantization.input_scale`), or if the model is not functional or computes larger batches only. The
        message names the sample.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.samples import read_samples
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> samples = read_samples([(np.zeros([8, 8, 3]), "label")], model)
      >>> [[array.shape for array in sample] for sample in samples]
      [[(1, 8, 8, 3)]]
    """
    if not graph.is_functional(model):
        raise ValueError(
            f"calibration needs a functional, or built Sequential, Keras 2 model, but got {type(model).__name__}"
        )
    if (batch := model.inputs[0].shape[0] or 1) > 1 and not graph.takes_any_batch(model):
        raise ValueError(
            f"model {model.name!r} computes batches of {batch} only, and files compute one sample at a time; build it "
            "with batch_size=1 or without a batch size"
        )
    inputs = [
        _Input(name, tuple(tensor.shape[1:]), np.dtype(tensor.dtype.as_numpy_dtype))
        for name, tensor in zip(graph.input_names(model), model.inputs, strict=True)
    ]
    samples: list[list[np.ndarray]] = []
    for element in _iterate(calibration, inputs):
        label = f"calibration {'image' if len(inputs) == 1 else 'sample'} {len(samples)}"
        values = _pick_inputs(element, inputs, isinstance(model.input, dict), label)
        samples.extend(_split_batch(values, inputs, len(samples)))
    if not samples:
        raise ValueError("there are no calibration images; activation ranges need at least one")
    check_scale(samples, model)
    return samples


def stack_samples(samples: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """One array [count, ...] for each input of a model.

    Args:
      samples: Samples of `read_samples`.

    Raises:
      ValueError: If images differ in size.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.quantization.samples import stack_samples
      >>> [array.shape for array in stack_samples([[np.zeros([1, 8, 8, 3])], [np.zeros([1, 8, 8, 3])]])]
      [(2, 8, 8, 3)]
    """
    columns = list(zip(*samples, strict=True))
    for arrays in columns:
        if len(sizes := {array.shape[1:] for array in arrays}) > 1:
            raise ValueError(
                f"calibration images differ in size: {', '.join(map(str, sorted(sizes)))}; give all of them the same "
                "size"
            )
    return [np.concatenate(arrays) for arrays in columns]


def _iterate(calibration, inputs) -> Iterable[Any]:
    """The samples or batches that calibration data consist of."""
    if calibration is None:
        return ()
    if callable(calibration):  # as TensorFlow's converter takes its representative data set
        calibration = calibration()
    if isinstance(calibration, tf.data.Dataset) and calibration.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("the calibration data set repeats without end; give a part of it: data_set.take(512)")
    if isinstance(calibration, Mapping) or _is_array(calibration):
        return (calibration,)
    if not isinstance(calibration, Iterable) and not hasattr(calibration, "__getitem__"):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}; it must be images: an array, a list, a generator or a "
            "tf.data.Dataset"
        )
    if isinstance(calibration, (list, tuple)) and _is_batch_for_each_input(calibration, inputs):
        return (tuple(calibration),)
    return calibration


def _is_array(value):
    return tf.is_tensor(value) or hasattr(value, "__array__")


def _is_batch_for_each_input(values, inputs):
    """Whether values are several inputs as `keras.Model.fit` takes them: an array for each, with all samples."""
    return (
        len(inputs) > 1
        and len(values) == len(inputs)
        and all(
            _is_array(value) and np.ndim(value) == len(spec.shape) + 1
            for value, spec in zip(values, inputs, strict=True)
        )
    )


def _pick_inputs(element, inputs, are_named, label) -> list[Any]:
    """The parts of an element that are the model's inputs, in their order; labels and weights are left out."""
    names = [spec.name for spec in inputs]
    if isinstance(element, Mapping):
        if missing := [name for name in names if name not in element]:
            raise ValueError(
                f"{label} has the keys {', '.join(map(repr, element))}, but not {missing[0]!r}; the model's inputs are "
                f"{', '.join(map(repr, names))}"
            )
        return [element[name] for name in names]
    if isinstance(element, (list, tuple)) and element:
        first = element[0]
        is_nested = isinstance(first, (Mapping, tuple)) or (isinstance(first, list) and any(map(_is_array, first)))
        if is_nested and len(element) <= 3:  # (inputs, labels, weights), as `keras.Model.fit` takes them
            return _pick_inputs(first, inputs, are_named, label)
        if len(inputs) == 1:
            return [_pick_only_input(element, inputs[0], label)]
        if len(element) == len(inputs) and not are_named:
            return list(element)
    if len(inputs) == 1:
        return [element]
    kind = f"{type(element).__name__} of {len(element)}" if isinstance(element, (list, tuple)) else "single value"
    form = "a dictionary" if are_named else "a dictionary, or a tuple in this order,"
    raise ValueError(f"{label} is a {kind}; it must be {form} of the model's inputs {', '.join(map(repr, names))}")


def _pick_only_input(element, spec, label):
    """The image of (image, label, weight); or the list itself, if it is an image or a batch of images."""
    first, rank = element[0], len(spec.shape)
    if not _is_array(first) or np.ndim(first) < rank:
        return element
    if isinstance(element, list) and len(element) > 1 and np.shape(first) == np.shape(element[1]):
        raise ValueError(
            f"{label} is a list of {len(element)} arrays of shape {np.shape(first)}; give an array [count, ...] if "
            "they are images, and a tuple if the others are labels"
        )
    return first


def _split_batch(values, inputs, start) -> Iterator[list[np.ndarray]]:
    """Splits batches, one for each input, into samples; `start` is the number of samples before."""
    noun = "image" if len(inputs) == 1 else "sample"

    def describe(index, spec):
        return f"calibration {noun} {start + index}" + (f" of input {spec.name!r}" if len(inputs) > 1 else "")

    batches = []
    for value, spec in zip(values, inputs, strict=True):
        array = _to_array(value, describe(0, spec))
        is_batch = array.ndim == len(spec.shape) + 1
        shape = array.shape[1:] if is_batch else array.shape
        if not tf.TensorShape(spec.shape).is_compatible_with(shape):
            raise ValueError(f"{describe(0, spec)} has shape {shape}; the model's input is {spec.shape}")
        batches.append(array if is_batch else array[np.newaxis])
    counts = [len(batch) for batch in batches]
    if len(set(counts)) > 1:
        raise ValueError(f"calibration {noun} {start}: the inputs have {', '.join(map(str, counts))} values each")
    batches = [
        _cast(batch, spec.dtype, lambda index, spec=spec: describe(index, spec))
        for batch, spec in zip(batches, inputs, strict=True)
    ]
    return ([batch[index : index + 1] for batch in batches] for index in range(counts[0]))


def _to_array(value, label):
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # such as a list of rows of different lengths
        raise ValueError(f"{label} is a {type(value).__name__} that is no array of numbers") from None
    if array.dtype.kind in "OSUMm":
        raise ValueError(f"{label} is a {type(value).__name__} that holds {array.dtype.name}, not numbers")
    return array


def _cast(batch, dtype, describe):
    """A batch in the dtype of an input, checked to fit; `describe` names the sample at an index."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        fits = (batch == np.round(batch)) & (batch >= limits.min) & (batch <= limits.max)
        problem = f"{{}}; the model's input takes whole numbers from {limits.min} to {limits.max} ({dtype.name})"
    elif dtype.kind == "b":
        fits = (batch == 0) | (batch == 1)
        problem = "{}; the model's input takes 0 and 1 (bool)"
    else:
        batch = batch.astype(dtype, copy=False)
        fits = np.isfinite(batch)
        problem = "infinities or NaN"
    if not np.all(fits):
        position = tuple(int(index) for index in np.argwhere(~fits)[0])
        raise ValueError(f"{describe(position[0])} holds {problem.format(batch[position])}")
    return batch.astype(dtype, copy=False)
