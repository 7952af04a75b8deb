"""The folder a training run lives in: what is written there, under which names, and how it is read back."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import tensorflow as tf
import tf_keras as keras

MODEL_NAME = "model.keras"
CONFIG_NAME = "config.flags"
INPUT_NAME = "input.json"
_LOCK_NAME = ".lock"
_PARTIAL = ".partial"

# Open lock files by folder: a lock lasts until its process ends, however that ends.
_claims = {}


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path` that takes its place when the block ends without an error.

    The block writes a file there, or makes a folder of files. They are on the disk before they take their place, so
    that not even a power cut leaves half of them under their name. What a killed process leaves is a folder
    `.<name>.partial`; the next to write `path`, or to claim its folder, removes it.

    Raises:
      OSError: names `path` and why it cannot be written; what was there before is intact.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}{_PARTIAL}")
    temporary = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            _flush_to_disk(written)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    except (OSError, tf.errors.OpError) as error:
        raise OSError(f"cannot write {str(path)!r} ({_reason(error)}); what was written before is intact") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error):
    if isinstance(error, OSError):
        return error.strerror or error
    # "{{node ...}} path; reason [Op:...]", and more lines
    return error.message.partition("\n")[0].rpartition("; ")[2].partition(" [Op:")[0]


def _flush_to_disk(path):
    """Waits until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder):
    """Removes what a killed process was writing to a folder; only for the one process that writes there."""
    for leftover in Path(folder).glob(f".*{_PARTIAL}"):
        shutil.rmtree(leftover)


def write_json(path, content):
    """Writes JSON so that the file is whole or absent."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_bytes(path, content):
    """Writes bytes so that the file is whole or absent."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def append_line(path, line):
    """Adds one line to a text file, and waits until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def writable_folder(path) -> Path:
    """Makes a folder if need be.

    Raises:
      NotADirectoryError: if `path` is a file.
      PermissionError: if nothing can be written there.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file; give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise PermissionError(f"{str(path)!r} cannot be written to ({error.strerror})") from None
    return path


def claimed_folder(path) -> Path:
    """Makes a folder if need be, and keeps other processes out of it for as long as this one lives.

    Raises:
      BlockingIOError: if another process has claimed it; names that process.
      NotADirectoryError: if `path` is a file.
      PermissionError: if nothing can be written there.
    """
    path = writable_folder(path)
    if path.resolve() in _claims:
        return path
    file = open(path / _LOCK_NAME, "a+", encoding="ascii")  # noqa: SIM115  (open is what keeps the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            process = file.read().strip()
        raise BlockingIOError(
            f"{str(path)!r} is in use by process {process}; wait until it has ended, or use another folder"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _claims[path.resolve()] = file
    remove_partial(path)
    return path


def claimed_by(folder) -> str | None:
    """The process, by its id, that has claimed a folder and still lives; None if there is none."""
    try:
        with open(Path(folder) / _LOCK_NAME, encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
    except FileNotFoundError:
        pass
    return None


class Unfinished:
    """Files that took long to make, kept until all that belong together are done, for the command that is run again.

    Each lies under the hash of everything that it depends on, so that one that was made otherwise is never taken for
    it, and is there whole or not at all.

    Args:
      folder: claimed folder of the command's output; they are in ".unfinished" there.
      depends_on: JSON-serializable; what all of them depend on.
    """

    def __init__(self, folder, **depends_on):
        self._folder = Path(folder) / ".unfinished"
        self._depends_on = depends_on

    def read(self, **step) -> tuple[dict, bytes] | None:
        """(facts, file) as `keep` was given them for this step."""
        path = self._path(step)
        if not path.exists():
            return None
        return json.loads((path / "facts.json").read_text(encoding="utf-8")), (path / "file").read_bytes()

    def keep(self, facts: dict, file: bytes, **step):
        """Raises OSError as `written_whole`."""
        self._folder.mkdir(exist_ok=True)
        with written_whole(self._path(step)) as temporary:
            temporary.mkdir()
            (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            (temporary / "file").write_bytes(file)

    def remove(self):
        """All of them: the work is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step):
        content = json.dumps(self._depends_on | step, sort_keys=True).encode()
        return self._folder / hashlib.sha256(content).hexdigest()[:32]


def machine() -> dict:
    """What a measurement was made on: stands beside every number."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows more
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
    }


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
            claimed_folder(self.path)

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
        claimed_folder(self.path)
        self.check_config(flag_values)
        with written_whole(self.path / CONFIG_NAME) as temporary:
            temporary.write_text(_flags_of_main(flag_values), encoding="utf-8")
        write_json(self.path / INPUT_NAME, data.facts())

    def save_model(self, model):
        """Leaves model.keras; from here on the run is complete."""
        with written_whole(self.model_path) as temporary:
            model.save(temporary)

    def write_result(self, result):
        """Leaves result.json; the time of the training is the sum over its epochs, interruptions left out."""
        # A model that was trained elsewhere comes without its epochs.
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.exists() else []
        epochs = [json.loads(line) for line in lines]
        seconds = {entry["epoch"]: entry["seconds"] for entry in epochs}
        write_json(
            self.path / "result.json",
            {**result, "training_seconds": round(sum(seconds.values()), 1), "machine": machine()},
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
        process = claimed_by(path.parent)
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


def sources_sha256() -> str:
    """Tells one state of this package from another: the hash of its Python files, names included."""
    folder, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


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
