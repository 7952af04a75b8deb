"""The library's readers of files, and materials for all of them."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras
from PIL import Image
from safetensors.numpy import load_file

from harness.commands import ROOT
from tf_repvgg import checkpoints, report, runs, storage
from tf_repvgg.data import ClassNumbers, Preprocessing, image_checks
from tf_repvgg.models import build_repvgg
from tf_repvgg.tflite.isolated import Isolated
from tf_repvgg.training.checkpoints import Checkpoints

_PIXELS = 1e6
_WORK_INPUTS = {"bits": 4}
_KERAS_3_FILE = ROOT / "tests" / "reference" / "keras3" / "classifier.keras"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
      files: Pattern of the files that are mutated, in a folder of materials.
      read: Function that reads them, as programs do. It is given that folder, and the file.
      weight: Share of the mutations, relative to the others.
    """

    files: str
    read: Callable[[Path, Path], object]
    weight: float = 1.0


def make_materials(folder: Path, run: Path, integer_file: Path) -> None:
    """Writes files of every kind, each of which its reader takes.

    Args:
      folder: Folder to write to; anew, unless it is there.
      run: Finished run, which is copied.
      integer_file: TFLite file of it, which is copied.
    """
    if folder.exists():
        return
    with storage.atomic_write(folder) as temporary:
        shutil.copytree(run, temporary / "run", ignore=shutil.ignore_patterns("tensorboard", "export"))
        for name in ("foreign", "labels", "images", "integer"):
            (temporary / name).mkdir()
        shutil.copy(integer_file, temporary / "integer" / "file.tflite")
        shutil.copy(_KERAS_3_FILE, temporary / "foreign" / "keras3.keras")
        model = _make_foreign_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras advises against HDF5
            model.save(temporary / "foreign" / "keras2.h5", save_format="h5")
        checkpoints.save_torch(model, temporary / "foreign" / "torch.safetensors")
        np.savez(temporary / "foreign" / "torch.npz", **load_file(temporary / "foreign" / "torch.safetensors"))
        names = [f"class{number}" for number in range(10)]
        (temporary / "labels" / "labels.txt").write_text("".join(f"{name}\n" for name in names))
        rows = [f"{name},{number}\n" for number, name in enumerate(names)]
        (temporary / "labels" / "labels.csv").write_text("name,number\n" + "".join(rows))
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for suffix in ("png", "jpg", "gif", "bmp"):
            Image.fromarray(pixels).save(temporary / "images" / f"image.{suffix}")
        trainer = _make_trainer()
        saved = Checkpoints(temporary / "checkpoints", trainer)
        saved.set_model(trainer)
        saved.on_epoch_end(0)
        work = storage.FinishedWork(temporary / "kept", is_sealed=True)
        work.keep("work", _WORK_INPUTS, {"top1": 91.25}, b"TFL3" * 100)


class Readers:
    """All readers; models that they read weights into are made once."""

    def __init__(self) -> None:
        self._foreign_model = _make_foreign_model()
        self._trainer = _make_trainer()
        self.table = {
            "input.json": Reader("run/input.json", self._read_input, 3),
            "metrics.jsonl": Reader("run/metrics.jsonl", self._read_history, 3),
            "result.json": Reader("run/result.json", self._read_history, 3),
            "config.flags": Reader("run/config.flags", self._read_history, 2),
            "checkpoint": Reader("checkpoints/*/*", self._read_checkpoint, 2),
            "model.keras": Reader("run/model.keras", lambda folder, path: runs.load_model(path)),
            "model of Keras 3": Reader("foreign/keras3.keras", lambda folder, path: checkpoints.load_keras(path)),
            "model in HDF5": Reader("foreign/keras2.h5", lambda folder, path: checkpoints.load_keras(path)),
            "safetensors": Reader("foreign/torch.safetensors", self._read_torch, 2),
            "npz": Reader("foreign/torch.npz", self._read_torch, 2),
            "labels": Reader("labels/*", lambda folder, path: ClassNumbers.read(path, 10), 2),
            "image": Reader("images/*", self._read_image, 3),
            ".tflite": Reader("integer/file.tflite", self._run_integer_file, 2),
            "kept work": Reader("kept/*", self._find_work, 2),
        }

    def check(self, folder: Path) -> None:
        """Reads all files as they are, which no reader may refuse.

        Raises:
          ValueError: If one does.
        """
        for name, reader in self.table.items():
            for path in sorted(path for path in folder.glob(reader.files) if path.is_file()):
                try:
                    reader.read(folder, path)
                except Exception as error:
                    raise ValueError(f"the reader {name!r} refuses the whole file {path}: {error}") from error

    def _read_input(self, folder, path):
        Preprocessing.from_metadata(runs.read_input(path.parent))

    def _read_history(self, folder, path):
        report.check_history(path.parent)

    def _read_checkpoint(self, folder, path):
        Checkpoints(path.parents[1], self._trainer)

    def _read_torch(self, folder, path):
        checkpoints.load_torch(path, self._foreign_model)

    def _read_image(self, folder, path):
        defect = image_checks.find_defect(path, _PIXELS)
        if defect:
            raise ValueError(defect)
        image_checks.decode(tf.io.read_file(str(path)))

    def _run_integer_file(self, folder, path):
        with Isolated(path.name, path.read_bytes()) as file:
            file.costs()
            file.metadata("tf_repvgg")
            file.times(2)
            file.predict(np.zeros([2, 8, 8, 1], np.float32))

    def _find_work(self, folder, path):
        """A record that is taken must be the one that was kept: another one would end in a wrong file."""
        work = storage.FinishedWork(path.parent, is_sealed=True)
        record = work.find("work", _WORK_INPUTS)
        if record is None:
            raise ValueError("damaged, so it is computed again")
        if record["top1"] != 91.25 or work.read_content("work") != b"TFL3" * 100:
            raise AssertionError(f"a changed record was taken: {json.dumps(record)}")


def _make_trainer() -> keras.Model:
    trainer = build_repvgg("digits", (8, 8, 1), 10)
    trainer.compile("sgd")
    return trainer


def _make_foreign_model() -> keras.Model:
    keras.utils.set_random_seed(0)  # the same file to mutate each time
    return build_repvgg("digits", (8, 8, 1), 10, padding="symmetric")
