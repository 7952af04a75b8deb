"""Files of Keras 3 with changes: `rewrite` makes them from a small classifier that Keras 3 has saved."""

import io
import json
import zipfile
from pathlib import Path

import h5py

FOLDER = Path(__file__).resolve().parents[1] / "reference" / "keras3"


def rewrite(path, change_config=lambda config: None, change_weights=lambda file: None, compression=zipfile.ZIP_STORED):
    """Writes a changed copy of the classifier's file."""
    with zipfile.ZipFile(FOLDER / "classifier.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change_config(config)
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        change_weights(file)
    members |= {"config.json": json.dumps(config).encode(), "model.weights.h5": weights.getvalue()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def set_argument(name, value, layer=2):
    return lambda config: config["config"]["layers"][layer]["config"].__setitem__(name, value)


def spread_constants_over_images(config):
    """A Normalization whose two constants Keras would spread over 400 million pixels."""
    images = config["config"]["layers"][0]["config"]
    images["batch_shape"] = [None, 20_000, 20_000, 3]
    arguments = {"name": "spread", "axis": [1, 2], "mean": 0.0, "variance": 1.0, "invert": False, "dtype": "float32"}
    config["config"]["layers"][1] = {"class_name": "Normalization", "module": "keras.layers", "config": arguments}


def nest_models(config):
    """Thirty models, each of which calls the one before twice."""
    model = config.copy()
    for number in range(30):
        inner = {**model, "inbound_nodes": [{"args": [], "kwargs": {}}] * 2}
        model = {**config, "class_name": "Functional", "config": {"name": f"outer{number}", "layers": [inner]}}
    config |= model
