"""Training runs: the folder of a run, the files in it, and how they are read back."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tf_keras as keras

from tf_repvgg import json_records, provenance, regular_files, run_records, storage
from tf_repvgg.checkpoints import load_keras

MODEL_NAME = "model.keras"
CONFIG_NAME = "config.flags"
INPUT_NAME = "input.json"
METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"

_FILES = (MODEL_NAME, CONFIG_NAME, INPUT_NAME, METRICS_NAME, RESULT_NAME)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The value of one flag.

    Attributes:
      line: Line of a flagfile that sets the flag: "--epochs=10", "--validation" or "--novalidation".
      is_default: Whether the flag has its default value.

    Example:
      >>> from tf_repvgg import runs
      >>> runs.Setting("--epochs=3", is_default=False)
      Setting(line='--epochs=3', is_default=False)
    """

    line: str
    is_default: bool


class Run:
    """The folder of a training run. Nothing is written, and no folder made, before `claim` or `start`.

    Args:
      workdir: Folder of the run.

    Attributes:
      path: Folder of the run.
      model_path: File of the final model.
      metrics_path: File with one JSON object per epoch, one per line.
      checkpoints_path: Folder of the checkpoints.
      tensorboard_path: Folder of TensorBoard's event files.

    Raises:
      ValueError: If the name of the workdir is empty.

    Example:
      >>> import os, tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     run = runs.Run(workdir)
      ...     run.start({"epochs": runs.Setting("--epochs=3", is_default=False)}, {"dataset": "digits"})
      ...     print(sorted(os.listdir(workdir)), run.is_trained)
      ['.lock', 'config.flags', 'input.json'] False
    """

    def __init__(self, workdir: str | Path) -> None:
        if not workdir:  # from an unset variable of the shell, perhaps; it would mean the current folder
            raise ValueError("the name of the workdir is empty; give a folder")
        self.path = Path(workdir)
        self.model_path = self.path / MODEL_NAME
        self.metrics_path = self.path / METRICS_NAME
        self.checkpoints_path = self.path / "checkpoints"
        self.tensorboard_path = self.path / "tensorboard"

    @property
    def is_trained(self) -> bool:
        """Whether training has ended: the final model exists."""
        return self.model_path.exists()

    def claim(self) -> None:
        """Keeps other processes out of the workdir, if it exists.

        Raises:
          OSError: If another process has claimed it, or nothing can be written there; see `storage.claim_folder`. Or
            if a folder in it is a link, or has the name of a file that the run writes.
          ValueError: If the workdir holds a run whose settings, or the description of its images, are missing.
        """
        if self.path.exists():
            for folder in (self.checkpoints_path, self.tensorboard_path):
                regular_files.check_no_link(folder)
            storage.check_no_folders(self.path / name for name in _FILES)
            has_begun = self.is_trained or any(self.checkpoints_path.glob("ckpt-*"))
            for name in (CONFIG_NAME, INPUT_NAME):
                if has_begun and not (self.path / name).exists():
                    raise ValueError(
                        f"workdir {str(self.path)!r} holds a run without {name}; put the file back, or use "
                        "another workdir"
                    )
            storage.claim_folder(self.path)

    def check_settings(self, settings: Mapping[str, Setting], may_differ: Collection[str] = ()) -> None:
        """Checks that the workdir holds no run with other settings.

        A setting that the run does not know is accepted at its default: the flag is younger than the run.

        Args:
          settings: {name of a flag: its value}, without flags that have none.
          may_differ: Names of flags that may have other values.

        Raises:
          OSError: If config.flags cannot be read.
          ValueError: If settings differ; names their flags. Or if config.flags is not text.
        """
        path = self.path / CONFIG_NAME
        if not path.exists():
            return
        lines_before = {_flag_name(line): line for line in regular_files.read_text(path).splitlines()}
        lines = {
            name: setting.line for name, setting in settings.items() if name in lines_before or not setting.is_default
        }
        names = (lines_before | lines).keys() - set(may_differ)
        if changed := sorted(name for name in names if lines_before.get(name) != lines.get(name)):
            raise ValueError(
                f"workdir {str(self.path)!r} holds a run with other values of {', '.join(changed)}; "
                f"use another workdir, or continue that run with --flagfile={path}"
            )

    def start(self, settings: Mapping[str, Setting], input_metadata: Mapping[str, Any]) -> None:
        """Makes and claims the workdir, and binds it to its settings.

        Writes config.flags, a flagfile with all settings, and input.json, which describes the images of the model.

        Args:
          settings: {name of a flag: its value}, without flags that have none.
          input_metadata: Dataset, preprocessing and labels, JSON-serializable: what `read_input` will return.

        Raises:
          ValueError: If the workdir holds a run with other settings; another process may have just made it.
          OSError: If the workdir cannot be claimed, or a file cannot be written.
        """
        storage.claim_folder(self.path)
        self.check_settings(settings)
        with storage.atomic_write(self.path / CONFIG_NAME) as temporary:
            temporary.write_text("".join(f"{setting.line}\n" for setting in settings.values()), encoding="utf-8")
        storage.write_json(self.path / INPUT_NAME, input_metadata)

    def save_model(self, model: keras.Model) -> None:
        """Writes the final model, which ends training."""
        with storage.atomic_write(self.model_path) as temporary:
            model.save(temporary)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json: a result, the seconds spent in training, without interruptions, and the machine.

        Args:
          result: What was measured, JSON-serializable.
        """
        seconds = {record["epoch"]: record["seconds"] for record in read_epochs(self.metrics_path)}
        storage.write_json(
            self.path / RESULT_NAME,
            {**result, "training_seconds": round(sum(seconds.values()), 1), "machine": provenance.machine()},
        )


def _flag_name(line):
    """The flag that a line of a flagfile sets: --name=value, --name or --noname."""
    name, equals, _ = line.lstrip("-").partition("=")
    return name if equals else name.removeprefix("no")


def read_epochs(path: str | Path, count: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none if there is no such file, as beside a model that was trained elsewhere.

    Args:
      path: Path of metrics.jsonl.
      count: Number of lines to read, from the first; None for all.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If a line is not the record of an epoch; names the line.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     path = pathlib.Path(workdir, "metrics.jsonl")
      ...     length = path.write_text('{"epoch": 1, "seconds": 2.5, "top1_percent": 50.0}')
      ...     runs.read_epochs(path)
      [{'epoch': 1, 'seconds': 2.5, 'top1_percent': 50.0}]
    """
    if not Path(path).exists():
        return []
    records = []
    for number, line in enumerate(regular_files.read_text(path).splitlines()[:count], start=1):
        name = f"{path}, line {number}"
        record = json_records.parse(line, dict[str, float], name)
        json_records.check(record, run_records.EpochRecord, name)
        records.append(record)
    return records


def read_result(path: str | Path) -> dict[str, Any]:
    """The content of result.json; empty if there is no such file.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If the file is damaged; names the key.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     runs.Run(workdir).write_result({"split": "test", "images": 360})
      ...     runs.read_result(f"{workdir}/result.json")["images"]
      360
    """
    return json_records.read(path, run_records.ResultRecord) if Path(path).exists() else {}


def folder_of(path: str | Path) -> Path:
    """The folder of a run.

    Args:
      path: The folder itself, or its model file.

    Raises:
      FileNotFoundError: If there is neither.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     pathlib.Path(workdir, runs.MODEL_NAME).touch()
      ...     runs.folder_of(f"{workdir}/model.keras") == pathlib.Path(workdir)
      True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the workdir of a run, or its {MODEL_NAME}")
    return path if path.is_dir() else path.parent


def read_input(path: str | Path) -> dict[str, Any]:
    """The description of a model's images that `Run.start` has written to input.json.

    Args:
      path: Folder of a run, or its model file.

    Raises:
      OSError: If there is no such run, or no such file, or it cannot be read.
      ValueError: If the file is damaged; names the key, what was found, and what is expected.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     runs.Run(workdir).start({}, {"dataset": "digits", "size": [8, 8]})
      ...     runs.read_input(workdir)
      {'dataset': 'digits', 'size': [8, 8]}
    """
    path = folder_of(path) / INPUT_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it says which dataset and image size the model expects")
    return run_records.parse_input(regular_files.read_bytes(path), str(path))


def load_model(path: str | Path, trust_model: bool = False) -> keras.Model:
    """Loads the final model of a run, or any other model of Keras 2 or Keras 3; see `checkpoints.load_keras`.

    Args:
      path: Folder of a run, or a .keras file.
      trust_model: Whether the file may run code, such as that of layers of your own.

    Returns:
      The model, not compiled.

    Raises:
      FileNotFoundError: If there is no model; names the process that is training one, if any.
      OSError: If it is not a regular file.
      ValueError: If the file is not a whole Keras model, names code that is on no list, or cannot be rebuilt in
        Keras 2.

    Example:
      >>> import tempfile
      >>> from tf_repvgg import runs
      >>> from tf_repvgg.models import build_repvgg
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     runs.Run(workdir).save_model(build_repvgg("digits", (8, 8, 1), 10))
      ...     runs.load_model(workdir).output_shape
      (None, 10)
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
    return load_keras(path, trust_model)


def model_sha256(path: str | Path) -> str:
    """The SHA-256 of a run's model file.

    Args:
      path: Folder of a run, or a .keras file.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import runs
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     pathlib.Path(workdir, runs.MODEL_NAME).touch()
      ...     runs.model_sha256(workdir)[:8]
      'e3b0c442'
    """
    path = Path(path)
    return regular_files.hash_file(path / MODEL_NAME if path.is_dir() else path)


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies all weights between models of the same architecture.

    Raises:
      ValueError: If names or shapes of weights differ; names the first difference.

    Example:
      >>> from tf_repvgg import runs
      >>> from tf_repvgg.models import build_repvgg
      >>> source, target = (build_repvgg("digits", (8, 8, 1), 10) for _ in range(2))
      >>> runs.copy_weights(source, target)
      >>> bool((source.weights[0].numpy() == target.weights[0].numpy()).all())
      True
    """
    specs, source_specs = ([(w.name, tuple(w.shape)) for w in model.weights] for model in (target, source))
    for (name, shape), (source_name, source_shape) in zip(specs, source_specs, strict=False):
        if (name, shape) != (source_name, source_shape):
            raise ValueError(
                f"the checkpoint is of another network: it has {source_name} {source_shape} where this network has "
                f"{name} {shape}"
            )
    if len(specs) != len(source_specs):
        raise ValueError(
            f"the checkpoint is of another network: it has {len(source_specs)} weights, this network {len(specs)}"
        )
    target.set_weights(source.get_weights())
