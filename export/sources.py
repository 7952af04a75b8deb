"""The network that export/main.py takes, of a run or of a file of any origin, and its data: flags and loading."""

import dataclasses
from pathlib import Path
from typing import Any

from tf_repvgg import checkpoints, cli, fusion, image_flags, models, regular_files, runs, storage

# isort: split
import tf_keras as keras
from absl import flags

from tf_repvgg.data import ClassificationData, ClassNumbers, Preprocessing
from tf_repvgg.training import finished_runs

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "Run folder of train/main.py, or a .keras file.")
flags.DEFINE_string(
    "init_from",
    None,
    "Network that comes from elsewhere: a .keras file of Keras 2 or Keras 3, or with --variant a checkpoint of a "
    "PyTorch network (.safetensors, .npz, .pth).",
)
cli.define_trust_flag()
flags.DEFINE_enum(
    "variant", None, list(models.VARIANTS), "Network of a PyTorch checkpoint in --init_from.", case_sensitive=False
)
flags.DEFINE_string(
    "output", None, "Folder to write to; by default 'export' in the workdir. Required with --init_from."
)
flags.DEFINE_string(
    "dataset", None, "TFDS name, or folder:PATH; by default the dataset of the run. Required for other networks."
)
image_flags.define_image_flags(default_normalization=None)
flags.DEFINE_string(
    "labels",
    None,
    "File that numbers the classes of the network, for a dataset that has only some of them, or in another order: a "
    ".csv file with the name of a class (of its folder) and its number, or names in the order of their numbers, one "
    "per line. By default the dataset's classes in alphabetical order.",
)
flags.DEFINE_enum("evaluation_split", "test", ["validation", "test"], "Split that is evaluated, whole.")

# Folder in the output where a network from elsewhere is written as a run, with its preprocessing and classes.
_NETWORK_FOLDER = "network"
_DEFAULT_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Source:
    """A network and its data.

    Attributes:
      path: Run folder, or file of the network.
      is_run: Whether the network is that of a run; its input.json describes its images.
      model: The network.
      metadata: Content of input.json: the dataset and preprocessing of the network.
      data: Dataset of the flags, preprocessed as the network expects.
      notes: One sentence for each thing that a user should know about the weights.
    """

    path: Path
    is_run: bool
    model: keras.Model
    metadata: dict[str, Any]
    data: ClassificationData
    notes: tuple[str, ...] = ()

    def write_run(self, output: Path) -> Path:
        """The folder of the run; a network from elsewhere is written to the output as one, for train/main.py too."""
        if self.is_run:
            return self.path
        run = runs.Run(output / _NETWORK_FOLDER)
        storage.claim_folder(run.path)
        storage.write_json(run.path / runs.INPUT_NAME, self.metadata)
        run.save_model(self.model)
        return run.path


def find_output() -> Path:
    """The folder to write to."""
    if FLAGS.output:
        return Path(FLAGS.output)
    folder = runs.folder_of(FLAGS.workdir) / "export"
    regular_files.check_no_link(folder)
    return folder


def load_source() -> Source:
    """Loads the network and the dataset of the flags, which must fit each other.

    Raises:
      FileNotFoundError: If a file or the dataset is missing.
      ValueError: If a file is damaged, the network cannot be read, flags do not go together, or the dataset does not
        fit the network.
    """
    path = _find_path()
    if _is_run(path):
        return _load_run(path)
    if FLAGS.init_from and not FLAGS.output:
        raise ValueError("--output is missing; with --init_from, name the folder to write to")
    if not FLAGS.dataset:
        raise ValueError(
            "--dataset is missing; name the images to calibrate and evaluate on, such as --dataset=folder:PATH"
        )
    model, notes = _load_file(path)
    _check_interface(model, path)
    height, width = model.input_shape[1:3]
    data = _load_data(
        FLAGS.dataset,
        image_flags.read_preprocessing((height, width) if height and width else None),
        hold_out=FLAGS.evaluation_split == "validation",
        num_classes=model.output_shape[-1],
    )
    _check_fits(model, data)
    return Source(path, False, model, data.metadata(), data, notes)


def load_network() -> keras.Model:
    """Loads the network alone, which needs no dataset.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is damaged, or the network cannot be read.
    """
    path = _find_path()
    if _is_run(path):
        _refuse_flags_of_files()
        return runs.load_model(path, FLAGS.trust_model)
    return _load_file(path)[0]


def _find_path():
    if bool(FLAGS.workdir) == bool(FLAGS.init_from):
        raise ValueError("give either --workdir, the folder of a run, or --init_from, the file of a network")
    path = Path(FLAGS.workdir or FLAGS.init_from)
    if FLAGS.init_from and path.is_dir():
        raise ValueError(
            f"--init_from={path} is a folder; name the file of a network, or give a run as --workdir={path}"
        )
    return path


def _is_run(path):
    """A folder, or a file beside the input.json of its run, unless the flags say that it comes from elsewhere."""
    return not FLAGS.init_from and (not path.is_file() or (path.parent / runs.INPUT_NAME).exists())


def _refuse_flags_of_files():
    for name in ("variant", *image_flags.PREPROCESSING_FLAGS):
        if FLAGS[name].value is not None:
            raise ValueError(
                f"--{name}={FLAGS[name].value} does not go with a run, whose {runs.INPUT_NAME} and model decide on it; "
                "leave it out"
            )


def _load_run(path):
    _refuse_flags_of_files()
    metadata = runs.read_input(path)
    model = runs.load_model(path, FLAGS.trust_model)
    is_held_out = metadata.get("validation_held_out", False)
    data = _load_data(
        FLAGS.dataset or metadata["dataset"],
        Preprocessing.from_metadata(metadata),
        is_held_out,
        model.output_shape[-1],
    )
    _check_fits(model, data)
    labels = metadata.get("labels", data.labels)
    if len(labels) != len(data.labels):
        raise ValueError(
            f"{runs.INPUT_NAME} of {str(path)!r} names {len(labels)} classes, but {data.name!r} has {len(data.labels)}"
        )
    for number, (label, expected) in enumerate(zip(data.labels, labels, strict=True)):
        if label != expected:
            raise ValueError(f"class {number} of the model is {expected!r}, but that of {data.name!r} is {label!r}")
    if FLAGS.evaluation_split == "validation" and not is_held_out:
        raise ValueError("the model was trained on the validation split too; use --evaluation_split=test")
    return Source(path, True, model, metadata, data)


def _load_data(name, preprocessing, hold_out, num_classes):
    data = ClassificationData(
        name,
        FLAGS.data_dir,
        preprocessing,
        hold_out=hold_out,
        bad_images=FLAGS.bad_images,
        max_megapixels=FLAGS.max_megapixels,
        class_numbers=ClassNumbers.read(FLAGS.labels, num_classes) if FLAGS.labels else None,
    )
    if FLAGS.dataset:
        FLAGS.dataset = data.name  # without the path to a folder: export.json is for other machines too
    return data


def _check_fits(model, data):
    try:
        finished_runs.check_fits(model, data)
    except ValueError as error:
        if FLAGS.labels or model.output_shape[-1] <= data.num_classes:
            raise
        raise ValueError(f"{error}; if these are some of the model's classes, number them with --labels") from None


def _load_file(path):
    """The network in a file, and notes."""
    if not checkpoints.is_torch_file(path):
        if FLAGS.variant:
            raise ValueError(f"--variant={FLAGS.variant} is for checkpoints of PyTorch; {str(path)!r} is none")
        return checkpoints.load_keras(path, FLAGS.trust_model), ()
    if not FLAGS.variant:
        raise ValueError(f"--variant is missing; name the network of {str(path)!r}: {', '.join(models.VARIANTS)}")
    network = checkpoints.inspect_torch(path)
    size = FLAGS.image_size or _DEFAULT_SIZE
    blocks = models.find_blocks(models.find_variant(FLAGS.variant).family)
    model = models.build_network(
        FLAGS.variant,
        (size, size, 3),
        network.num_classes,
        block=network.kind if network.kind in blocks else None,
        padding="symmetric",
    )
    if network.form == "deploy":
        model = fusion.fuse(model)
    loaded = checkpoints.load_torch(path, model)
    if loaded.fresh_layers:
        raise ValueError(f"{str(path)!r} has no weights for layer {loaded.fresh_layers[0]!r}")
    return model, loaded.notes


def _check_interface(model, path):
    shapes = [tuple(tensor.shape) for tensor in model.inputs], [tuple(tensor.shape) for tensor in model.outputs]
    if [list(map(len, group)) for group in shapes] != [[4], [2]]:
        raise ValueError(
            f"the model in {str(path)!r} has inputs of shape {shapes[0]} and outputs of shape {shapes[1]}; this "
            "program takes classifiers of images, from [batch, height, width, channels] to [batch, classes]; "
            "tf_repvgg.tflite.convert takes any model"
        )
