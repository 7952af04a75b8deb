"""Model files made to harm: they name code, read other files, take memory or time without end.

Each is made from a small network that loads. One that would run code makes the sentinel, a file that must not exist.
"""

import dataclasses
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py

from helpers.hostile_files import (
    METADATA,
    Workshop,
    call_operating_system,
    call_tensorflow,
    change_layer,
    compile_inside,
    compress,
    describe_function,
    describe_hdf5,
    enlarge,
    explode,
    feed_each_other,
    inflate_config,
    link,
    make_folder,
    make_virtual,
    nest,
    rename_archive,
    rename_bytecode,
    replace_layer,
    save_bytecode,
    spread_constants,
    state_shape,
    store_outside,
    wrap_twice,
    write_asset,
    write_extra,
    write_twice,
)
from helpers.keras3_files import nest_models, rewrite, set_argument, spread_constants_over_images


@dataclasses.dataclass(frozen=True)
class HostileModel:
    """A kind of file.

    Attributes:
      write: Function that writes the file, of a `Workshop`.
      message: Text in the refusal.
      may_be_trusted: Whether the file loads, or fails in Keras, with trust_model=True; the refusal says so.
    """

    write: Callable[["Workshop"], Path]
    message: str
    may_be_trusted: bool = False


HOSTILE_MODELS = {
    "Lambda that calls the operating system": HostileModel(call_operating_system(), "'Lambda'", True),
    "Lambda in wrappers": HostileModel(call_operating_system(wrap_twice), "'Lambda'", True),
    "Lambda in a nested model": HostileModel(nest, "layer 'dense' names the class 'Lambda'", True),
    "Lambda with bytecode in an archive": HostileModel(lambda w: save_bytecode(w, ".keras"), "'Lambda'", True),
    "Lambda with bytecode in HDF5": HostileModel(lambda w: save_bytecode(w, ".h5"), "'code' names the class", True),
    "Lambda with bytecode in HDF5 called .keras": HostileModel(rename_bytecode, "'Lambda'", True),
    "Lambda that downloads": HostileModel(
        replace_layer("Lambda", {"function": describe_function("keras.utils", "get_file")}), "'Lambda'", True
    ),
    "module that is imported": HostileModel(change_layer(module="this"), "'Dense' of 'this'", True),
    "module of Keras that holds functions": HostileModel(
        change_layer(module="keras.src.utils.data_utils", registered_name="get_file"), "'get_file' of", True
    ),
    "class with a dot": HostileModel(change_layer(class_name="Dense.__init__"), "'Dense.__init__'", True),
    "registered name of another class": HostileModel(
        change_layer(registered_name="tf_repvgg>RepVGGBlock"), "'tf_repvgg>RepVGGBlock'", True
    ),
    "registered name of this package, class of another": HostileModel(
        change_layer(class_name="RepVGGBlock", module="os", registered_name="tf_repvgg>RepVGGBlock"),
        "of 'os'",
        True,
    ),
    "registered name that is not registered": HostileModel(
        change_layer(class_name="Own", module=None, registered_name="tf_repvgg>Own"), "'tf_repvgg>Own'", True
    ),
    "activation of another module": HostileModel(
        change_layer(arguments={"activation": describe_function("os", "system")}), "the function 'system' of 'os'", True
    ),
    "activation that is a function of Keras's loader": HostileModel(
        change_layer(arguments={"activation": "deserialize"}), "'deserialize' as its activation", True
    ),
    "activation with another registered name": HostileModel(
        change_layer(
            arguments={
                "activation": {**describe_function("keras.activations", "relu"), "registered_name": "deserialize"}
            }
        ),
        "the function 'deserialize'",
        True,
    ),
    "initializer of another module": HostileModel(
        change_layer(
            arguments={"kernel_initializer": {"class_name": "Popen", "module": "subprocess", "config": {"args": "id"}}}
        ),
        "layer 'dense' names the class 'Popen' of 'subprocess'",
        True,
    ),
    "regularizer by name": HostileModel(change_layer(arguments={"kernel_regularizer": "get"}), "'get' as its", True),
    "type of a layer": HostileModel(
        change_layer(arguments={"dtype": {"class_name": "DType", "module": "numpy", "config": {}}}), "'DType'", True
    ),
    "bytecode as a value": HostileModel(
        change_layer(arguments={"activation": {"class_name": "__lambda__", "config": {"value": ["", None, None]}}}),
        "'__lambda__'",
        True,
    ),
    "type of tensors": HostileModel(
        change_layer(
            0, {"type_spec": {"class_name": "__typespec__", "spec_name": "system", "module": "os", "config": []}}
        ),
        "'__typespec__'",
        True,
    ),
    "layer that reads a file": HostileModel(
        replace_layer("StringLookup", {"vocabulary": "/etc/passwd"}), "'StringLookup'", True
    ),
    "operator by name": HostileModel(
        replace_layer("TensorFlowOpLayer", {"node_def": {"op": "ReadFile", "name": "read"}, "constants": {}}),
        "'TensorFlowOpLayer'",
        True,
    ),
    "method by name": HostileModel(replace_layer("InstanceMethod", {"attr_name": "eval"}), "'InstanceMethod'", True),
    "TensorFlow reads a file": HostileModel(call_tensorflow("io.read_file"), "calls the function 'io.read_file'", True),
    "TensorFlow writes a file": HostileModel(
        call_tensorflow("io.write_file", filename="SENTINEL"), "'io.write_file'", True
    ),
    "TensorFlow calls Python": HostileModel(
        call_tensorflow("py_function", func="print", Tout=[]), "'py_function'", True
    ),
    "TensorFlow calls Keras": HostileModel(call_tensorflow("keras.utils.get_file"), "'keras.utils.get_file'", True),
    "nested model that is compiled": HostileModel(compile_inside, "'StringLookup'", True),
    "SavedModel": HostileModel(make_folder, "is a folder, and the graph of a SavedModel can read and write", True),
    "layers that feed each other": HostileModel(feed_each_other, "wait for each other"),
    "models that call models": HostileModel(explode, "leads to more than 10,000 calls of layers"),
    "call of constants": HostileModel(
        replace_layer("Dense", {"units": 2}, [[["_CONSTANT_VALUE", -1, [[1.0]], {}]]]), "called with constants alone"
    ),
    "call that is not made": HostileModel(
        change_layer(inbound_nodes=[[["logits", 7, 0, {}]]]), "takes the output of call 7 of 'logits'"
    ),
    "many tensors": HostileModel(call_tensorflow("split", num_or_size_splits=10**9), "num_or_size_splits=1000000000"),
    "huge layer": HostileModel(
        change_layer(arguments={"units": 10**9}), "its layers have more weights than the file, which has"
    ),
    "huge input": HostileModel(
        change_layer(0, {"batch_input_shape": [None, 10**12]}), "its layers have more weights than the file"
    ),
    "huge layer in HDF5": HostileModel(
        lambda w: w.write_hdf5(describe_hdf5(lambda layers: layers[1]["config"].update(units=10**9))),
        "its layers have more weights than the file",
    ),
    "huge constants": HostileModel(
        spread_constants, "normalizes with constants along axes of a size that is not known"
    ),
    "huge block": HostileModel(
        replace_layer(
            *("MobileOneBlock", {"filters": 3, "conv_branches": 10**9}),
            module="tf_repvgg.layers.mobileone_block",
            registered_name="tf_repvgg>MobileOneBlock",
        ),
        "conv_branches is 1000000000",
    ),
    "huge outputs": HostileModel(enlarge, "'enlarge' in", True),
    "array of long text": HostileModel(
        change_layer(
            arguments={"units": {"class_name": "__numpy__", "config": {"value": [""], "dtype": "S1000000000"}}}
        ),
        "an array that is not of numbers",
    ),
    "layer that is text": HostileModel(
        lambda w: w.write_config({"class_name": "Sequential", "config": {"name": "s", "layers": ["Lambda"]}}),
        "is a Sequential of 'Lambda', which is no layer",
    ),
    "function in place of the model": HostileModel(
        lambda w: w.write_config(describe_function("keras.activations", "relu")), "is that of no model"
    ),
    "nested lists": HostileModel(lambda w: w.write_config("[" * 10**5), "cannot be loaded"),
    "large configuration": HostileModel(inflate_config, "config.json would unpack to 178"),
    "large asset": HostileModel(write_asset, "its members are 'assets/zeros'"),
    "path out of the archive": HostileModel(write_extra("../../out"), "its members are '../../out'"),
    "path from the root": HostileModel(write_extra("/tmp/out"), "its members are '/tmp/out'"),
    "link in the archive": HostileModel(
        write_extra(METADATA, b'{"keras_version": "2.21.0"}', stat.S_IFLNK | 0o777), "metadata.json is no regular file"
    ),
    "member twice": HostileModel(
        write_twice, "its members are 'metadata.json', 'config.json', 'model.weights.h5', ..."
    ),
    "archive of another name": HostileModel(rename_archive, "a file whose name ends in .keras"),
    "compressed weights": HostileModel(
        lambda w: w.write(w.members.items(), zipfile.ZIP_DEFLATED), "model.weights.h5 is compressed"
    ),
    "members of another compression": HostileModel(
        lambda w: w.write(w.members.items(), zipfile.ZIP_BZIP2), "is compressed by method 12"
    ),
    "link to another file": HostileModel(
        lambda w: w.write_weights(link(h5py.ExternalLink("/etc/passwd", "/x"))), "is a link to another place"
    ),
    "link within the file": HostileModel(lambda w: w.write_weights(link(h5py.SoftLink("/x"))), "is a link to another"),
    "HDF5 with a link to another file": HostileModel(
        lambda w: w.write_hdf5(link(h5py.ExternalLink("/etc/passwd", "/x"))), "is a link to another place"
    ),
    "weights in another file": HostileModel(
        lambda w: w.write_weights(store_outside), "/outside refers to another file"
    ),
    "virtual weights": HostileModel(lambda w: w.write_hdf5(make_virtual), "/virtual refers to another file"),
    "weights that are not there": HostileModel(lambda w: w.write_weights(state_shape), "/large states 40000000000"),
    "Keras 3, more weights than the file": HostileModel(
        lambda w: rewrite(w.folder / "hostile.keras", set_argument("filters", 10**8)), "have more weights than the file"
    ),
    "Keras 3, constants for every pixel": HostileModel(
        lambda w: rewrite(w.folder / "hostile.keras", spread_constants_over_images), "'spread' (Normalization): it norm"
    ),
    "Keras 3, models that call each other": HostileModel(
        lambda w: rewrite(w.folder / "hostile.keras", nest_models), "leads to more than 10,000 calls of layers"
    ),
    "weights that inflate": HostileModel(lambda w: w.write_hdf5(compress), "/large is stored in chunks"),
}
