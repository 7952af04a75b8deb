"""Keras models in files: those of Keras 2, and those of Keras 3, which are rebuilt without Keras 3."""

import contextlib
import io
import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph, regular_files
from tf_repvgg.checkpoints import keras2_file
from tf_repvgg.checkpoints.archives import check_compression
from tf_repvgg.checkpoints.keras2_config import UnknownCodeError
from tf_repvgg.checkpoints.keras2_file import (
    CONFIG,
    LARGEST_CONFIG,
    METADATA,
    WEIGHTS,
    check_contiguous,
    limit_variables,
    read_member,
)
from tf_repvgg.checkpoints.keras3_graph import StoredLayer, build_model

_LARGEST_EXPANSION = 100  # Keras does not compress; more than this is made to fill the memory
# HDF5 can loop for ever over a damaged file, where no signal reaches it; another process can be ended.
_READ_ALL = """
import io, sys, zipfile, h5py
path, member = sys.argv[1:]
source = path
if member:
    archive = zipfile.ZipFile(path)
    # HDF5 jumps to and fro, for which a compressed member would be unpacked each time.
    is_stored = archive.getinfo(member).compress_type == zipfile.ZIP_STORED
    source = archive.open(member) if is_stored else io.BytesIO(archive.read(member))
with h5py.File(source, "r") as file:
    dict(file.attrs)
    file.visititems(lambda _, item: dict(item.attrs) and None)
"""
_SECONDS_TO_READ = 10
_MOST_VALUES = 2**30  # 4 GiB in float32
# State that only training uses, beside the weights of layers.
_TRAINING_STATE = ("optimizer/", "seed_generator/", "loss_tracker/", "metrics/")


def load_keras(path: str | Path, trust_model: bool = False) -> keras.Model:
    """Loads a model that Keras 2 (tf_keras) or Keras 3 has saved, whichever it was.

    Nothing in the file is run: every class and function that it names must be on a list of layers of Keras, functions
    of TensorFlow and layers of this package, and everything else is refused. It must be a regular file, whose parts
    are those that Keras writes, which refers to no other file, and whose layers have no more weights than it holds.

    A functional or Sequential model of Keras 3 is rebuilt from layers of Keras 2 that compute the same, in float32.
    Initializers, regularizers and constraints are left out, and so are layers that augment images in training, such as
    RandomFlip.

    Args:
      path: A .keras file, or an HDF5 file of Keras 2.
      trust_model: Whether Keras 2 may run what the file names: layers of your own, Lambda layers, SavedModels. Whoever
        made such a file can run any program on this computer.

    Returns:
      The model, not compiled.

    Raises:
      OSError: If there is no such file, or it is not a regular one.
      ValueError: If the file is not a whole model; if it names code that is on no list: the message names the layer
        and class; or if a layer of Keras 3 cannot be rebuilt.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.checkpoints import load_keras
      >>> keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="logits")]).save("model.keras")
      >>> [layer.name for layer in load_keras("model.keras").layers]
      ['logits']
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}")
    if path.is_dir():
        return _load_saved_model(path, trust_model)
    regular_files.open_to_read(path, regular_files.MAX_MODEL_BYTES).close()
    with _name_damaged_file(path):
        version = _read_version(path)
    model = _load_keras_2(path, trust_model) if version < 3 else _load_keras_3(path, version)
    if not trust_model:
        _check_activations(path, model)
    return model


def _load_keras_3(path, version):
    """Rebuilds the model of a file of Keras 3."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is an HDF5 file of Keras {version}; save the model there as a .keras file")
    with _name_damaged_file(path), zipfile.ZipFile(path) as archive:
        config = json.loads(read_member(archive, CONFIG, LARGEST_CONFIG))
        weights = io.BytesIO(archive.read(WEIGHTS))
    try:
        with limit_variables(len(weights.getbuffer())):
            model, stored = build_model(config)
        _load_weights(weights, stored)
    except (OSError, RuntimeError, LookupError, TypeError) as error:  # h5py's, about damaged files
        raise ValueError(f"{str(path)!r} is not a whole Keras model ({error})") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r}, a model of Keras 3, cannot be read: {error}") from None
    return model


def _check_activations(path, model):
    """Refuses a layer whose outputs for one sample fill the memory: a few bytes in a file can state them."""
    for layer in graph.find_layers(model):
        for tensor in tf.nest.flatten([node.outputs for node in layer.inbound_nodes]):
            values = math.prod(size or 1 for size in tensor.shape[1:])
            if values > _MOST_VALUES:
                raise ValueError(
                    f"layer {layer.name!r} in {str(path)!r} computes {values:,} values for one sample, and at most "
                    f"{_MOST_VALUES:,} are accepted; {_HOW_TO_TRUST}"
                )


_LONGEST_REASON = 300
_HOW_TO_TRUST = "if you trust whoever made it, load it with --trust_model (in Python: trust_model=True)"


def _load_saved_model(path, trust_model):
    if not trust_model:
        raise ValueError(
            f"{str(path)!r} is a folder, and the graph of a SavedModel can read and write files; save the model as a "
            f".keras file, or {_HOW_TO_TRUST}"
        )
    with _name_damaged_file(path):
        return keras.models.load_model(path, compile=False)


def _load_keras_2(path, trust_model):
    """Loads a file of Keras 2."""
    try:
        if trust_model:
            return keras.models.load_model(path, compile=False, safe_mode=False)
        return keras2_file.load(path)
    except UnknownCodeError as error:
        raise ValueError(f"{str(path)!r} could run code: {error}; {_HOW_TO_TRUST}") from None
    except Exception as error:
        # The cause, where Keras quotes one behind the configuration. One sentence: Keras's next ones may advise to load
        # the file without its protection.
        cause = str(error).rpartition("Exception encountered: ")[2].strip()
        reason = cause.partition("\n")[0].partition(". ")[0][:_LONGEST_REASON]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{str(path)!r} cannot be loaded as a model of Keras 2 ({kind}{reason})") from None


@contextlib.contextmanager
def _name_damaged_file(path: Path) -> Iterator[None]:
    """Turns the errors about a damaged file that Keras passes on from zipfile, json and h5py into one."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a whole Keras model ({type(error).__name__}: {error})") from None


def _read_version(path):
    """The first number of the version of Keras that has written a file; 2 for formats that only Keras 2 writes."""
    version = "2"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_compression(archive)
            version = json.loads(read_member(archive, METADATA, LARGEST_CONFIG))["keras_version"]
            _check_expansion(archive)
        _check_that_reading_ends(path, WEIGHTS)
    elif not h5py.is_hdf5(path):
        raise ValueError("it is neither a .keras file nor an HDF5 file")
    else:
        _check_that_reading_ends(path)
        with h5py.File(path, "r") as file:
            version = file.attrs.get("keras_version", version)
    return int(str(version).partition(".")[0])


def _check_that_reading_ends(path, member=""):
    """Refuses an HDF5 file, or such a member of an archive, whose structure HDF5 follows for ever, or crashes over."""
    command = [sys.executable, "-P", "-c", _READ_ALL, path, member]
    try:
        reading = subprocess.run(command, capture_output=True, timeout=_SECONDS_TO_READ, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"HDF5 does not read its structure within {_SECONDS_TO_READ} s, so it is damaged") from None
    if reading.returncode < 0:
        raise ValueError(f"HDF5 crashes as it reads its structure (signal {-reading.returncode})")


def _check_expansion(archive):
    member = archive.getinfo(WEIGHTS)
    if member.file_size > _LARGEST_EXPANSION * max(member.compress_size, 1):
        raise ValueError(f"{WEIGHTS} would unpack to {member.file_size} bytes")


def _load_weights(content: io.BytesIO, stored: list[StoredLayer]) -> None:
    """Sets the weights of all layers.

    Raises:
      ValueError: If weights are missing, left over, or of other shapes.
    """
    with h5py.File(content, "r") as file:
        datasets = _list_datasets(file)
        for place in stored:
            _check_name(file, place)
            values = []
            for index, weight in enumerate(place.layer.weights):
                key, shape = f"{place.path}/vars/{index}", tuple(weight.shape)
                dataset = datasets.pop(key, None)
                if dataset is None:
                    raise ValueError(f"layer {place.name!r}: its weight {weight.name!r} is not in the file ({key})")
                if dataset.shape != shape:
                    raise ValueError(f"layer {place.name!r}: {key} has the shape {dataset.shape}, not {shape}")
                values.append(_read_array(dataset))
            place.layer.set_weights(values)
            if isinstance(place.layer, keras.layers.Normalization):
                place.layer.finalize_state()  # computes from the weights what its calls use
    if datasets:
        raise ValueError(f"its file has weights that no layer takes: {', '.join(list(datasets)[:3])}")


def _list_datasets(file) -> dict[str, h5py.Dataset]:
    """{path: dataset} of all weights. Links, also to other files, are not followed, so that they are missing."""
    datasets: dict[str, h5py.Dataset] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not any(state in f"{name}/" for state in _TRAINING_STATE):
            check_contiguous(item)
            datasets[name] = item

    file.visititems(add)
    return datasets


def _check_name(file: Mapping[str, Any], place: StoredLayer) -> None:
    """Recent versions write the layer's name beside its weights."""
    group = file.get(f"{place.path}/vars")
    name = None if group is None else group.attrs.get("name")
    if name is not None and name != place.name:
        raise ValueError(f"layer {place.name!r}: {place.path} in the file holds the weights of layer {name!r}")


def _read_array(dataset):
    array = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
