"""The folder a training run lives in: what is written there, under which names, and how it is read back."""

import hashlib
import json
from pathlib import Path

import tf_keras as keras

from tf_repvgg import provenance, storage

MODEL_NAME = "model.keras"
CONFIG_NAME = "config.flags"
INPUT_NAME = "input.json"


class Run:
    """The workdir of a training run. Nothing is written there, and no folder made, before `claim` or `start`."""

    def __init__(self, workdir):
        if not workdir:  # a shell variable that is not set, say; it would mean the current folder
            raise ValueError("the name of the workdir is empty; give a folder")
        self.path = Path(workdir)
        self.checkpoints_path = str(self.path / "checkpoints")
        self.tensorboard_path = str(self.path / "tensorboard")
        self.metrics_path = self.path / "metrics.jsonl"
        self.model_path = self.path / MODEL_NAME

    @property
    def is_complete(self) -> bool:
        """True once training has ended and the final model is there."""
        return self.model_path.exists()

    def claim(self):
        """Keeps other processes out of a workdir that exists; raises what `claimed_folder` does."""
        if self.path.exists():
            storage.claim_folder(self.path)

    def check_config(self, flag_values, but=()):
        """Refuses flags other than those of the run that the workdir holds already; those named in `but` may differ.

        Raises:
          ValueError: names the flags that differ.
        """
        path = self.path / CONFIG_NAME
        if not path.exists():
            return
        theirs = {_flag_name(line): line for line in path.read_text(encoding="utf-8").splitlines()}
        ours = {_flag_name(line): line for line in _flags_of_main(flag_values).splitlines()}
        # By its default, a flag that is younger than the run does what the run did.
        ours = {name: line for name, line in ours.items() if name in theirs or not _is_default(flag_values[name])}
        if changed := sorted(name for name in (theirs | ours).keys() - set(but) if theirs.get(name) != ours.get(name)):
            raise ValueError(
                f"workdir {str(self.path)!r} holds a run with other values of {', '.join(changed)}; "
                f"use another workdir, or --flagfile={path} to go on with that one"
            )

    def start(self, flag_values, data):
        """Leaves config.flags, which reruns the run, and input.json, which says what images the model expects.

        Makes and claims the workdir first. From here on it is bound to these flags.

        Raises:
          ValueError: as `check_config`; another process may have made the workdir since.
          OSError: as `claimed_folder` and `written_whole`.
        """
        storage.claim_folder(self.path)
        self.check_config(flag_values)
        with storage.atomic_write(self.path / CONFIG_NAME) as temporary:
            temporary.write_text(_flags_of_main(flag_values), encoding="utf-8")
        storage.write_json(self.path / INPUT_NAME, data.facts())

    def save_model(self, model):
        """Leaves model.keras; from here on the run is complete."""
        with storage.atomic_write(self.model_path) as temporary:
            model.save(temporary)

    def write_result(self, result):
        """Leaves result.json; the time of the training is the sum over its epochs, interruptions left out."""
        # A model that was trained elsewhere comes without its epochs.
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        epochs = [json.loads(line) for line in lines]
        seconds = {entry["epoch"]: entry["seconds"] for entry in epochs}
        storage.write_json(
            self.path / "result.json",
            {**result, "training_seconds": round(sum(seconds.values()), 1), "machine": provenance.machine()},
        )


def _flags_of_main(flag_values):
    """The program's own flags as a flagfile; not those that change nothing about the trained weights."""
    flags = flag_values.get_key_flags_for_module("__main__")
    left_out = {"workdir", "data_dir", "evaluate_only", "checkpoint_minutes"}
    return "".join(f"{flag.serialize()}\n" for flag in flags if flag.name not in left_out and flag.value is not None)


def _is_default(flag):
    return flag.value == flag.default


def _flag_name(line):
    """The flag that a line of a flagfile sets: --name=value, --name or --noname."""
    name, equals, _ = line.lstrip("-").partition("=")
    return name if equals else name.removeprefix("no")


def folder_of(path) -> Path:
    """The workdir that `path` is, or that the model file `path` lies in.

    Raises:
      FileNotFoundError: if there is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the workdir of a run, or its {MODEL_NAME}")
    return path if path.is_dir() else path.parent


def read_input(path) -> dict:
    """What input.json of the run at `path`, a workdir or the model file in it, says about its images.

    Raises:
      FileNotFoundError: if there is no such run, or no such file.
    """
    path = folder_of(path) / INPUT_NAME
    if not path.exists():
        raise FileNotFoundError(f"no {path}; it says which dataset and image size the model expects")
    return json.loads(path.read_text(encoding="utf-8"))


def load_model(path) -> keras.Model:
    """Loads a training-form model from a .keras file or from the workdir that holds one.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is no whole Keras model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MODEL_NAME
    if not path.exists():
        process = storage.lock_holder(path.parent)
        advice = (
            f"process {process} is training it" if process else f"train one with train/main.py --workdir={path.parent}"
        )
        raise FileNotFoundError(f"no model at {str(path)!r}; {advice}")
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever zipfile, json or h5py do.
        raise ValueError(f"{str(path)!r} is not a whole Keras model ({type(error).__name__}: {error})") from None


def model_sha256(path) -> str:
    """Tells one trained model from another: the hash of the run's model file."""
    path = Path(path)
    return hashlib.sha256((path / MODEL_NAME if path.is_dir() else path).read_bytes()).hexdigest()


def copy_weights(source, target):
    """Copies all weights between models of one architecture.

    Raises:
      ValueError: if names or shapes differ; names the first difference.
    """
    ours, theirs = ([(w.name, tuple(w.shape)) for w in model.weights] for model in (target, source))
    for mine, its in zip(ours, theirs, strict=False):
        if mine != its:
            raise ValueError(
                f"the checkpoint is of another network: it has {its[0]} {its[1]} where {mine[0]} {mine[1]} is"
            )
    if len(ours) != len(theirs):
        raise ValueError(f"the checkpoint is of another network: it has {len(theirs)} weights, this one {len(ours)}")
    target.set_weights(source.get_weights())
