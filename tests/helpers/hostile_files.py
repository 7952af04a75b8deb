"""How the files of `hostile_models` are made, from a small network whose file loads."""

import copy
import io
import json
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import tf_keras as keras

METADATA, CONFIG, WEIGHTS = "metadata.json", "config.json", "model.weights.h5"


class Workshop:
    """Makes hostile files in a folder.

    Args:
      folder: Folder for the files, which exists.

    Attributes:
      sentinel: File that a file which runs code would make.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sentinel = folder / "sentinel"
        inputs = keras.Input([4], name="inputs")
        outputs = keras.layers.Dense(3, activation="relu", name="dense")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(outputs), name="network")
        model.save(folder / "plain.keras")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras advises against HDF5
            model.save(folder / "plain.h5")
        with zipfile.ZipFile(folder / "plain.keras") as archive:
            self._members = {name: archive.read(name) for name in archive.namelist()}

    @property
    def members(self) -> dict[str, bytes]:
        """Content of the members of the network's file by name."""
        return dict(self._members)

    @property
    def config(self) -> dict:
        """Configuration of the network: inputs, dense and logits."""
        return json.loads(self._members[CONFIG])

    def write(self, members, compression=zipfile.ZIP_STORED, name="hostile.keras") -> Path:
        """Writes an archive; members are (name or ZipInfo, content)."""
        path = self.folder / name
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
            warnings.simplefilter("ignore")  # members of one name
            for member, content in members:
                archive.writestr(member, content)
        return path

    def write_config(self, config) -> Path:
        """Writes the network with another configuration: JSON, or its text."""
        text = config if isinstance(config, bytes | str) else json.dumps(config)
        return self.write((self.members | {CONFIG: text}).items())

    def write_weights(self, change: Callable[[h5py.File], None]) -> Path:
        """Writes the network with a changed file of weights."""
        content = io.BytesIO(self._members[WEIGHTS])
        with h5py.File(content, "a") as file:
            change(file)
        return self.write((self.members | {WEIGHTS: content.getvalue()}).items())

    def write_hdf5(self, change: Callable[[h5py.File], None], name="hostile.h5") -> Path:
        """Writes the network as a changed HDF5 file."""
        path = self.folder / name
        path.write_bytes((self.folder / "plain.h5").read_bytes())
        with h5py.File(path, "a") as file:
            change(file)
        return path


def change_layer(number=1, arguments=None, **entries):
    """A file whose layer of that number has other entries, and other arguments in its configuration."""

    def write(workshop):
        config = workshop.config
        layer = config["config"]["layers"][number]
        layer.update(entries)
        layer["config"].update(arguments or {})
        return workshop.write_config(config)

    return write


def replace_layer(class_name, arguments, nodes=None, wrap=lambda layer: layer, **entries):
    """A file with a layer of another class in place of the layer `dense`."""

    def write(workshop):
        config = workshop.config
        layers, fill = config["config"]["layers"], json.loads(json.dumps(arguments))
        layer = {"module": "keras.layers", "registered_name": None, "class_name": class_name, **entries}
        layer["config"] = {"name": "dense", "trainable": True, "dtype": "float32", **fill}
        layers[1] = {**wrap(layer), "name": "dense", "inbound_nodes": nodes or layers[1]["inbound_nodes"]}
        text = json.dumps(config).replace("SENTINEL", str(workshop.sentinel))
        return workshop.write_config(text)

    return write


def describe_function(module, name):
    return {"class_name": "function", "module": module, "config": name, "registered_name": name}


def call_operating_system(wrap=lambda layer: layer):
    nodes = [[["_CONSTANT_VALUE", -1, "touch SENTINEL", {}]]]
    return replace_layer("Lambda", {"function": describe_function("os", "system"), "arguments": {}}, nodes, wrap)


def call_tensorflow(function, **arguments):
    nodes = [["inputs", 0, 0, arguments]]
    module = "tf_keras.src.layers.core.tf_op_layer"
    return replace_layer("TFOpLambda", {"function": function}, nodes, module=module, registered_name="TFOpLambda")


def wrap_twice(layer):
    for name in ("inner", "dense"):
        arguments = {"name": name, "layer": layer}
        layer = {
            "module": "keras.layers",
            "class_name": "TimeDistributed",
            "config": arguments,
            "registered_name": None,
        }
    return layer


def nest(workshop):
    """The Lambda in a model in the network."""
    config = workshop.config
    inner = copy.deepcopy(config)
    inner["config"]["layers"][1] = {
        **{"module": "keras.layers", "class_name": "Lambda", "registered_name": None, "name": "dense"},
        "config": {"name": "dense", "function": describe_function("os", "system")},
        "inbound_nodes": inner["config"]["layers"][1]["inbound_nodes"],
    }
    config["config"]["layers"][1] = {**inner, "name": "dense", "inbound_nodes": [[["inputs", 0, 0, {}]]]}
    return workshop.write_config(config)


def save_bytecode(workshop, ending):
    """A Lambda layer as Keras itself saves it, whose code makes the sentinel."""

    def run(inputs, path=str(workshop.sentinel)):
        open(path, "w").close()
        return inputs

    path = workshop.folder / f"bytecode{ending}"
    model = keras.Sequential([keras.Input([4]), keras.layers.Lambda(run, name="code")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    workshop.sentinel.unlink()  # Keras has called the function
    return path


def rename_bytecode(workshop):
    path = workshop.folder / "renamed.keras"
    save_bytecode(workshop, ".h5").rename(path)
    return path


def explode(workshop):
    """Thirty models, each of which calls the one before twice."""
    config = workshop.config
    model = copy.deepcopy(config)
    for number in range(30):
        layers = [copy.deepcopy(config["config"]["layers"][0]), {**model, "name": "inner"}]
        layers[1]["inbound_nodes"] = [[["inputs", 0, 0, {}]], [["inner", 1, 0, {}]]]
        outer = {"name": f"outer{number}", "layers": layers}
        outer |= {"input_layers": [["inputs", 0, 0]], "output_layers": [["inner", 2, 0]]}
        model = {"module": "keras", "class_name": "Functional", "registered_name": None, "config": outer}
    return workshop.write_config(model)


def feed_each_other(workshop):
    config = workshop.config
    config["config"]["layers"][1]["inbound_nodes"] = [[["logits", 0, 0, {}]]]
    return workshop.write_config(config)


def spread_constants(workshop):
    """Constants for every pixel of an image that a layer has enlarged."""
    config = workshop.config
    enlarge, normalize = config["config"]["layers"][1:]
    enlarge |= {"class_name": "RepeatVector", "config": {"name": "dense", "n": 10**9}}
    arguments = {"name": "logits", "axis": [1, 2], "mean": 0.0, "variance": 1.0}
    normalize |= {"class_name": "Normalization", "config": arguments}
    return workshop.write_config(config)


def compile_inside(workshop):
    """A nested model that Keras would compile with a loss of another module."""
    config = workshop.config
    inner = copy.deepcopy(config) | {"compile_config": {"loss": describe_function("os", "system")}}
    config["config"]["layers"][1] = {**inner, "name": "dense", "inbound_nodes": [[["inputs", 0, 0, {}]]]}
    config["config"]["layers"][1]["config"]["layers"][1]["class_name"] = "StringLookup"
    return workshop.write_config(config)


def link(target):
    """A change that puts a link in place of the first group in a file of weights."""

    def change(file):
        path = next(iter(file))
        del file[path]
        file[path] = target

    return change


def describe_hdf5(change):
    """A change of the configuration in an HDF5 file."""

    def change_file(file):
        config = json.loads(file.attrs["model_config"])
        change(config["config"]["layers"])
        file.attrs["model_config"] = json.dumps(config)

    return change_file


def state_shape(file):
    """An array that states 40 GB, of which none are stored."""
    file.create_dataset("large", (10**10,), "float32")


def compress(file):
    file.create_dataset("large", data=np.zeros(10**6, "float32"), compression="gzip")


def store_outside(file):
    file.create_dataset("outside", (10,), "float32", external=[("/etc/passwd", 0, 40)])


def make_virtual(file):
    layout = h5py.VirtualLayout((10,), "float32")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (10,))
    file.create_virtual_dataset("virtual", layout)


def write_extra(name, content=b"", mode=stat.S_IFREG | 0o600):
    def write(workshop):
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        members = [(name, text) for name, text in workshop.members.items() if name != member.filename]
        return workshop.write([*members, (member, content)])

    return write


def write_asset(workshop):
    members = [*workshop.members.items(), ("assets/zeros", bytes(10**7))]
    return workshop.write(members, zipfile.ZIP_DEFLATED)


def write_twice(workshop):
    return workshop.write([*workshop.members.items(), (CONFIG, workshop.members[CONFIG])])


def inflate_config(workshop):
    member = zipfile.ZipInfo(CONFIG)
    member.compress_type = zipfile.ZIP_DEFLATED
    members = [(name, content) for name, content in workshop.members.items() if name != CONFIG]
    return workshop.write([*members, (member, b" " * (17 * 2**20) + b"{}")])


def make_folder(workshop):
    path = workshop.folder / "saved_model"
    path.mkdir()
    (path / "saved_model.pb").touch()
    return path


def rename_archive(workshop):
    return workshop.write(workshop.members.items(), name="hostile.h5")


def enlarge(workshop: Workshop) -> Path:
    """The network with an output of 80 GB for each sample."""
    network = keras.models.load_model(workshop.folder / "plain.keras")
    maps = keras.layers.Reshape([1, 1, 2])(network.output)
    outputs = keras.layers.UpSampling2D(10**5, name="enlarge")(maps)
    config = keras.saving.serialize_keras_object(keras.Model(network.input, outputs, name="network"))
    return workshop.write_config(config)
