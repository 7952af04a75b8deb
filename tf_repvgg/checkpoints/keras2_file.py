"""Files of Keras 2, looked at from end to end before Keras sees them: a zip archive (.keras) or an HDF5 file (.h5)."""

import contextlib
import json
import math
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import tensorflow as tf
import tf_keras as keras
from tf_keras.src.saving.serialization_lib import ObjectSharingScope

from tf_repvgg.checkpoints import keras2_config, keras2_graph

METADATA, CONFIG, WEIGHTS = "metadata.json", "config.json", "model.weights.h5"
# Python's objects for JSON take thirty times as much. A network of a thousand layers has a megabyte.
LARGEST_CONFIG = 16 * 2**20
# Variables beside those in the file: Keras makes some in another type, and a few that it does not save.
_LARGEST_RATIO, _SMALL_VARIABLES = 2, 16 * 2**20
_LARGEST_NUMBER = 16


def load(path: Path) -> keras.Model:
    """Loads a model, if nothing in its file can run code, read other files, or take more memory than it should.

    The number of all weights is that of the file: a layer that states more is refused before its memory is taken.

    Args:
      path: A .keras or .h5 file of Keras 2.

    Returns:
      The model, not compiled.

    Raises:
      keras2_config.UnknownCodeError: If the file names classes or functions that are on no list.
      ValueError: If the file is damaged, or made to harm.
    """
    if zipfile.is_zipfile(path):
        return _load_archive(path)
    with h5py.File(path, "r") as file:
        stored_bytes = _check_datasets(file, path.stat().st_size)
        _parse_config(_read_attribute(file, "model_config"))
        with limit_variables(stored_bytes):
            return _check_model(keras.models.load_model(file, compile=False))


def _load_archive(path):
    if path.suffix != ".keras":
        raise ValueError("a model of Keras 2 is in it, which Keras reads only from a file whose name ends in .keras")
    with zipfile.ZipFile(path) as archive:
        _check_members(archive)
        config = _parse_config(read_member(archive, CONFIG, LARGEST_CONFIG))
        with archive.open(WEIGHTS) as member, h5py.File(member, "r") as file:
            stored_bytes = _check_datasets(file, archive.getinfo(WEIGHTS).file_size)
    with limit_variables(stored_bytes):
        with ObjectSharingScope():  # as Keras does, so that a layer of two nested models stays one layer
            model = _check_model(keras.saving.deserialize_keras_object(config))
        model.load_weights(path)
    return model


def _check_members(archive):
    """Only the three members that Keras writes: it would unpack all others into a folder."""
    names = [member.filename for member in archive.infolist()]
    if sorted(names) != sorted([METADATA, CONFIG, WEIGHTS]):
        unknown = [name for name in names if name not in (METADATA, CONFIG, WEIGHTS)]
        raise ValueError(f"its members are {_list(unknown or names)}; expected: {METADATA}, {CONFIG} and {WEIGHTS}")
    for member in archive.infolist():
        mode = member.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise ValueError(f"its member {member.filename} is no regular file")
    if archive.getinfo(WEIGHTS).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its member {WEIGHTS} is compressed, which Keras does not do; zip the files as they are")


def read_member(archive: zipfile.ZipFile, name: str, largest: int) -> bytes:
    """Reads a member of an archive.

    Args:
      archive: Archive to read from.
      name: Name of the member.
      largest: Largest size in bytes to which it may unpack.

    Raises:
      ValueError: If it is larger.
    """
    member = archive.getinfo(name)
    if member.file_size > largest:
        raise ValueError(f"{name} would unpack to {member.file_size} bytes")
    return archive.read(member)


def _read_attribute(file, name):
    """A text in the header of an HDF5 file."""
    if name not in file.attrs:
        raise ValueError(f"it is an HDF5 file without {name}, so it holds no whole model")
    if (size := file.attrs.get_id(name).get_storage_size()) > LARGEST_CONFIG:
        raise ValueError(f"its {name} has {size} bytes")
    text = file.attrs[name]
    if not isinstance(text, str | bytes) or len(text) > LARGEST_CONFIG:
        raise ValueError(f"its {name} is no text, or has too many bytes")
    return text


def _parse_config(content):
    """The configuration of a model without what it was compiled with; checks everything in it."""
    config = json.loads(content)
    if not (isinstance(config, dict) and "class_name" in config and isinstance(config.get("config"), dict | list)):
        raise ValueError("its configuration is that of no model")
    keras2_config.drop_compilation(config)
    keras2_config.check_classes(config)
    keras2_graph.check_calls(config)
    return config


def _check_model(model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise ValueError(f"it holds a {type(model).__name__}, not a model")
    return model


def _check_datasets(file, size):
    """Checks that all arrays are in the file itself, one after the other; returns their number of bytes."""
    number, visited, waiting = 0, set(), [file]
    while waiting:
        group = waiting.pop()
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{group.name}/{name} is a link to another place")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in visited:
                continue
            visited.add(address)
            if isinstance(item, h5py.Group):
                waiting.append(item)
            elif isinstance(item, h5py.Dataset):
                number += _measure(item)
    if number > size:
        raise ValueError(f"its arrays have {number} bytes, but the file only {size}")
    return number


def _measure(dataset):
    """The number of bytes of an array, which must be there one by one: Keras neither compresses nor leaves out any."""
    check_contiguous(dataset)
    if dataset.dtype.hasobject or dataset.dtype.itemsize > _LARGEST_NUMBER or dataset.shape is None:
        raise ValueError(f"{dataset.name} is no array of numbers")
    stated, stored = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if stated != stored or dataset.id.get_create_plist().get_nfilters():
        raise ValueError(f"{dataset.name} states {stated} bytes, but {stored} are stored")
    return stated


def check_contiguous(dataset: h5py.Dataset) -> None:
    """Checks that the values of an array are in one piece in the file, as Keras writes them.

    HDF5 looks up pieces in trees, which a damaged file can close to circles.

    Args:
      dataset: Array in the file.

    Raises:
      ValueError: If the values are in pieces or in another file.
    """
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} refers to another file")
    if dataset.chunks is not None:
        raise ValueError(f"{dataset.name} is stored in chunks, which Keras does not do")


@contextlib.contextmanager
def limit_variables(stored_bytes: int) -> Iterator[None]:
    """A context that refuses variables for which a file has no numbers, before Keras takes memory for them.

    Args:
      stored_bytes: Bytes of all arrays in the file.

    Raises:
      ValueError: If the layers that are built within have more weights than the file.
    """
    largest = _LARGEST_RATIO * stored_bytes + _SMALL_VARIABLES
    number, refusal = 0, None

    def create(next_creator, **arguments):
        nonlocal number, refusal
        shape = tf.TensorShape(arguments.get("shape"))
        elements = math.prod(shape) if shape.is_fully_defined() else 1
        number += elements * tf.as_dtype(arguments.get("dtype") or tf.float32).size
        if number > largest:
            refusal = f"its layers have more weights than the file, which has {stored_bytes} bytes of them"
            raise ValueError(refusal)
        return next_creator(**arguments)

    try:
        with tf.variable_creator_scope(create):
            yield
    finally:
        if refusal:  # Keras wraps errors into others, or passes over them
            raise ValueError(refusal)


def _list(names):
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
