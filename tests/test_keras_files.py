"""Models that Keras 3 has saved, read without it: reference files, what is refused, and damaged or hostile files."""

import zipfile

import h5py
import numpy as np
import pytest
import tf_keras as keras
from helpers.keras3_files import FOLDER, rewrite, set_argument

from tf_repvgg import tflite
from tf_repvgg.checkpoints import keras_file, load_keras

NAMES = ("convolutions", "sequences", "operations", "nested", "classifier", "half_precision")


def read_results(name):
    """Images and outputs of a reference model."""
    with np.load(FOLDER / "results.npz") as arrays:
        content = {key: arrays[key] for key in arrays if key.startswith(f"{name}/")}
    return [[array for key, array in content.items() if f"/{kind}" in key] for kind in ("input", "output")]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_keras_3(name):
    model = load_keras(FOLDER / f"{name}.keras")
    images, expected = read_results(name)
    actual = model(images if len(images) > 1 else images[0])
    # Keras 3 computes with the half-precision weights in half precision too.
    tolerance = 2e-2 if name == "half_precision" else 1e-5
    for output, expected_output in zip(actual if isinstance(actual, list) else [actual], expected, strict=True):
        np.testing.assert_allclose(output, expected_output, rtol=tolerance, atol=tolerance)


def test_models_of_keras_3_become_integer_files_and_files_of_keras_2(tmp_path):
    model = load_keras(FOLDER / "nested.keras")
    assert len(model.trainable_weights) == 6  # those of `base` are frozen
    (images,), (expected,) = read_results("nested")
    file = tflite.convert(model, np.concatenate([images] * 4))
    assert np.abs(tflite.predict(file, images) - expected).max() < 0.1 * np.abs(expected).max()
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(load_keras(tmp_path / "model.keras")(images), expected, rtol=1e-4, atol=1e-5)


REFUSED = {
    "lambda": "layer 'double' (Lambda): it holds code of its own, which is never run",
    "own_layer": "layer 'double' (Doubled): this class is of 'user>Doubled', not of Keras",
    "own_model": "(OwnModel): this class of models cannot be read",
    "recurrent": "layer 'memory' (LSTM): layers of this class are not among those that are rebuilt",
    "operation": "(Cumsum): this operation is not among those that are rebuilt",
    "activation": "layer 'conv' (Conv2D): its activation 'celu' cannot be read",
    "training": "layer 'norm' (BatchNormalization): it is called with 1 arguments and training",
    "channels_first": "layer 'pool' (MaxPooling2D): its data_format is channels_first",
    "quantized": "(Dense): it computes in 'QuantizedDTypePolicy'",
    "dictionary": "its inputs or outputs are a dictionary",
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_named_and_refused(name):
    with pytest.raises(ValueError) as error:
        load_keras(FOLDER / f"refused_{name}.keras")
    assert REFUSED[name] in str(error.value)
    assert f"refused_{name}.keras', a model of Keras 3, cannot be read: " in str(error.value)
    assert "\n" not in str(error.value)


def move_to_other_file(file):
    """A weight whose content is in a file of the reader's, which a poisoned file may ask for."""
    del file["layers/dense/vars/1"]
    file["layers/dense/vars/1"] = h5py.ExternalLink("/etc/passwd", "/x")


def store_in_other_file(file):
    del file["layers/dense/vars/1"]
    file["layers/dense/vars"].create_dataset("1", (10,), "float32", external=[("/etc/passwd", 0, 40)])


def replace(file, key, value):
    del file[key]
    file[key] = value


DAMAGED = {
    "missing": (
        lambda file: file.__delitem__("layers/dense/vars/1"),
        "layer 'dense': its weight 'dense/bias:0' is not",
    ),
    "left over": (lambda file: file.create_dataset("layers/lora/vars/0", (2,)), "no layer takes: layers/lora/vars/0"),
    "shape": (lambda file: replace(file, "layers/dense/vars/1", np.zeros(9)), "has the shape (9,), not (10,)"),
    "name": (lambda file: file["layers/dense/vars"].attrs.__setitem__("name", "other"), "weights of layer 'other'"),
    "link": (move_to_other_file, "layer 'dense': its weight 'dense/bias:0' is not in the file"),
    "external": (store_in_other_file, "layers/dense/vars/1 refers to another file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_weights_that_do_not_fit_are_refused(case, tmp_path):
    change, message = DAMAGED[case]
    with pytest.raises(ValueError) as error:
        load_keras(rewrite(tmp_path / "model.keras", change_weights=change))
    assert message in str(error.value)


POISONED = {
    "unknown argument": (set_argument("shear", 3), "layer 'conv2d' (Conv2D): its argument shear=3 has no counterpart"),
    "object as an argument": (
        set_argument("filters", {"module": "os", "class_name": "system", "config": {}}),
        "layer 'conv2d' (Conv2D): it has an argument of the class 'system'",
    ),
    "function as an activation": (
        set_argument("activation", {"module": "os", "class_name": "function", "config": "relu"}),
        "layer 'conv2d' (Conv2D): its activation 'function' cannot be read",
    ),
    "value of no sense": (set_argument("strides", "wide"), "layer 'conv2d' (Conv2D): "),
    "no layers": (lambda config: config["config"].__delitem__("layers"), "KeyError: 'layers'"),
    "never built": (
        lambda config: (config["config"].__delitem__("build_input_shape"), config["config"]["layers"].pop(0)),
        "it was saved before it was built",
    ),
}


@pytest.mark.parametrize("case", POISONED)
def test_configurations_of_no_sense_are_refused(case, tmp_path):
    change, message = POISONED[case]
    with pytest.raises(ValueError) as error:
        load_keras(rewrite(tmp_path / "model.keras", change_config=change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(keras_file, "LARGEST_CONFIG", 1000)
    with pytest.raises(ValueError, match=r"is not a whole Keras model \(ValueError: config\.json would unpack to"):
        load_keras(FOLDER / "classifier.keras")
    monkeypatch.undo()
    path = rewrite(
        tmp_path / "model.keras",
        change_weights=lambda file: file.create_dataset("layers/dense/vars/2", data=np.zeros(10**7, "int8")),
        compression=zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(ValueError, match=r"model\.weights\.h5 would unpack to 1\d* bytes"):
        load_keras(path)


def test_damage_within_the_file_of_weights_is_one_line(tmp_path):
    """h5py raises errors of many kinds; each byte of the table of names counts, so a few are tried."""
    with zipfile.ZipFile(FOLDER / "classifier.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = members["model.weights.h5"]
    for signature in (b"SNOD", b"TREE", b"HEAP"):
        members["model.weights.h5"] = content.replace(signature, b"XXXX")
        with zipfile.ZipFile(tmp_path / "damaged.keras", "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        with pytest.raises(ValueError, match=r"damaged\.keras' is not a whole Keras model"):
            load_keras(tmp_path / "damaged.keras")


def test_files_of_keras_2_and_truncated_ones(tmp_path):
    source = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    for name in ("network.keras", "network.h5"):
        source.save(tmp_path / name)
        np.testing.assert_array_equal(load_keras(tmp_path / name).get_weights()[0], source.get_weights()[0])
    source.add(keras.layers.Lambda(lambda inputs: 2 * inputs))
    source.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match=r"lambda\.keras' could run code: layer 'lambda' names the class 'Lambda'; if"):
        load_keras(tmp_path / "lambda.keras")
    with h5py.File(tmp_path / "network.h5", "a") as file:
        file.attrs["keras_version"] = "3.15.1"
    with pytest.raises(ValueError, match=r"network\.h5' is an HDF5 file of Keras 3; save the model there as a \.keras"):
        load_keras(tmp_path / "network.h5")
    content = (FOLDER / "classifier.keras").read_bytes()
    (tmp_path / "truncated.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"truncated\.keras' is not a whole Keras model"):
        load_keras(tmp_path / "truncated.keras")
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_keras(tmp_path / "nothing.keras")
