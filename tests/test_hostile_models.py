"""Model files that could run code, read other files or take memory without end: each is refused with one line."""

import resource
import sys
import types
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.hostile_files import Workshop
from helpers.hostile_models import HOSTILE_MODELS
from tensorflow.python.util.tf_export import get_symbol_from_name

from tf_repvgg import fusion, runs
from tf_repvgg.checkpoints import inspect_torch, keras_file, load_keras, tensorflow_functions
from tf_repvgg.layers import MobileOneBlock, RepVGGBlock

MOST_MEMORY = 300 * 2**10  # kB; those of the files that are about memory would take gigabytes


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("hostile"))


def measure_memory():
    """The most memory that this process has ever had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("kind", HOSTILE_MODELS)
def test_hostile_models_are_refused_and_nothing_runs(kind, workshop):
    hostile = HOSTILE_MODELS[kind]
    path = hostile.write(workshop)
    memory = measure_memory()
    with pytest.raises(ValueError) as error:
        load_keras(path)
    message = str(error.value)
    assert hostile.message in message
    assert path.name in message and "\n" not in message and len(message) < 600
    assert ("--trust_model" in message) == hostile.may_be_trusted
    assert not workshop.sentinel.exists() and "this" not in sys.modules
    assert measure_memory() - memory < MOST_MEMORY


def test_trusted_models_run_their_code(workshop, tmp_path):
    """Which shows, too, that the files are what they are taken for."""
    for kind in ("Lambda with bytecode in an archive", "Lambda with bytecode in HDF5 called .keras"):
        path = HOSTILE_MODELS[kind].write(workshop)
        model = load_keras(path, trust_model=True)
        np.testing.assert_array_equal(model(np.ones([1, 4], "float32")), np.ones([1, 4]))
        workshop.sentinel.unlink()
    keras.Sequential([keras.Input([4]), keras.layers.Dense(2)]).save(tmp_path / "saved")
    assert load_keras(tmp_path / "saved", trust_model=True).output_shape == (None, 2)


def test_layers_of_users_need_trust(tmp_path):
    @keras.saving.register_keras_serializable(package="mine")
    class Doubled(keras.layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    keras.Sequential([keras.Input([4]), Doubled(name="double")]).save(tmp_path / runs.MODEL_NAME)
    message = (
        r"model\.keras' could run code: layer 'double' names the class 'mine>Doubled' of '.*'; if you trust whoever "
        r"made it, load it with --trust_model \(in Python: trust_model=True\)$"
    )
    with pytest.raises(ValueError, match=message):
        runs.load_model(tmp_path)
    assert isinstance(runs.load_model(tmp_path, trust_model=True).layers[-1], Doubled)


def build_friendly_network():
    """Everything in one network that the check looks at closely, and that is as it should be."""
    image, other = keras.Input([16, 16, 3], name="image"), keras.Input([16, 16, 3], name="other")
    x = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])(keras.layers.Rescaling(0.5)(image))
    x = RepVGGBlock(8, norm="oabn", name="block")(tf.concat([x, other, 3.0 - x], axis=-1))
    x = MobileOneBlock(8, name="mobile")(x[:, ::2] * 2.0 + x[:, 1::2])
    conv = keras.layers.Conv2D(8, 3, padding="same", activation="swish", kernel_regularizer="l2", name="conv")
    inner = keras.Sequential([conv, keras.layers.LeakyReLU(0.1)], name="inner")
    nested_input = keras.Input([None, None, 8])
    nested = keras.Model(nested_input, keras.layers.Dropout(0.5)(keras.layers.PReLU(shared_axes=[1, 2])(nested_input)))
    nested.compile("adam", "mse", metrics=["mae"])  # which is left out
    scale = keras.saving.get_registered_object("Custom>CustomScaleLayer")  # of keras.applications
    x = scale(0.5)([nested(nested(x)), inner(inner(x))])
    x = keras.layers.MultiHeadAttention(2, 4)(*[keras.layers.Reshape([-1, 8])(x)] * 2)
    first, second = tf.split(x, 2, axis=-1)
    x = keras.layers.Activation(keras.layers.ReLU(6.0))(tf.maximum(first, second))
    x = keras.layers.TimeDistributed(
        keras.layers.Dense(3, bias_initializer=tf.constant_initializer(0.5), name="dense")
    )(x)
    model = keras.Model([image, other], keras.layers.Softmax()(tf.reduce_mean(x, axis=1)), name="friendly")
    model.compile("sgd", "mse")
    return model


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.filterwarnings("ignore:The `keras.initializers.serialize")
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_models_without_harm_are_loaded_as_they_were(ending, tmp_path):
    model = build_friendly_network()
    images = [np.random.default_rng(seed).normal(size=[2, 16, 16, 3]).astype("float32") for seed in range(2)]
    model.save(tmp_path / f"model{ending}")
    loaded = load_keras(tmp_path / f"model{ending}")
    np.testing.assert_allclose(loaded(images), model(images), rtol=1e-5, atol=1e-6)
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in model.layers]
    assert loaded.optimizer is None
    fused = fusion.fuse(loaded)
    fused.save(tmp_path / f"fused{ending}")
    again = load_keras(tmp_path / f"fused{ending}")
    np.testing.assert_array_equal(again(images), fused(images))
    assert again.pre_activation_statistics.keys() == fused.pre_activation_statistics.keys()


def test_functions_of_tensorflow_exist_and_take_no_functions():
    values = {name: get_symbol_from_name(name) for name in tensorflow_functions.FUNCTIONS}
    present = {name: value for name, value in values.items() if value is not None}
    assert {name for name, value in present.items() if not isinstance(value, types.FunctionType)} == set()
    unknown = {name for name in values if name not in present and f"compat.v1.{name}" not in present}
    assert {name for name in unknown if not name.startswith("compat.v1.")} == set()
    for name in ("io.read_file", "py_function", "numpy_function", "print", "map_fn", "saved_model.load"):
        assert name not in values and f"compat.v1.{name}" not in values


def test_members_are_those_that_keras_writes(workshop):
    """Of a network that may be changed, whose file then loads again."""
    path = workshop.write(workshop.members.items())
    assert load_keras(path).name == "network"
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 3


def test_members_of_npz_files_unpack_to_what_they_state(tmp_path):
    """Which bz2 does not see to."""
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive, archive.open("linear.weight.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros([2, 3], "float32"))
    with pytest.raises(
        ValueError, match=r"weights\.npz' is refused: its member 'linear\.weight\.npy' is compressed by"
    ):
        inspect_torch(path)


def make_endless(path):
    """Sets the size of a text in the heap of an HDF5 file, which holds the texts of its header, to no bytes."""
    with h5py.File(path, "a") as file:
        file.attrs["keras_version"], file.attrs["model_config"] = "2.21.0", "{}"
    content = bytearray(path.read_bytes())
    size = content.find(b"GCOL") + 24
    content[size : size + 8] = bytes(8)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["HDF5", "archive", "compressed archive"])
def test_files_that_hdf5_reads_for_ever_are_refused(kind, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(keras_file, "_SECONDS_TO_READ", 2)
    path = tmp_path / "model.h5"
    make_endless(path)
    if kind != "HDF5":
        members = workshop.members | {keras_file.WEIGHTS: path.read_bytes()}
        path = workshop.write(
            members.items(), zipfile.ZIP_STORED if kind == "archive" else zipfile.ZIP_DEFLATED, "model.keras"
        )
    with pytest.raises(
        ValueError, match=rf"{path.name}' is not a whole Keras model .*does not read its structure within 2 s"
    ):
        load_keras(path)
