"""Rows of experiments/mobileone.py: MobileOne-S0 quantized in one way, its file run on both sets of photographs."""

import dataclasses
import hashlib
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.mobileone.network import load_network
from harness.mobileone.photographs import Photographs, load_test_sets, load_validation_sets
from harness.ptq import ai_edge
from harness.ptq.cells import AI_EDGE
from tf_repvgg import provenance, tflite
from tf_repvgg.quantization import ptq

FLOAT = "float"
SETS = ("same", "other")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to quantize the network.

    Attributes:
      method: Method of `ptq.METHODS`, or several joined by "+"; `AI_EDGE` followed by a name in `ai_edge.ALGORITHMS`;
        or `FLOAT`.
      bits: Weight width.
      granularity: "per_tensor" or "per_channel".
      activation_bits: Activation width.
    """

    method: str
    bits: int = 8
    granularity: str = "per_channel"
    activation_bits: int = 8

    @property
    def name(self) -> str:
        """Name of the row's result."""
        method = self.method.replace("+", "_").replace(" ", "_")
        return f"{method}_w{self.bits}_a{self.activation_bits}_{self.granularity}"

    @property
    def is_ours(self) -> bool:
        """Whether this package quantizes."""
        return self.method != FLOAT and not self.method.startswith(AI_EDGE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all rows share.

    Attributes:
      data_dir: Folder of the network and the photographs.
      is_validation: Whether to score the photographs that settings are chosen on.
      calibration_images: Number of photographs that methods see.
      iterations: Steps for each layer of methods that learn.
      scored_images: Number of photographs of each set that are scored; None for all.
    """

    data_dir: str
    is_validation: bool
    calibration_images: int
    iterations: int
    scored_images: int | None = None

    def find_inputs(self, row: Row) -> dict:
        """Everything that the result of a row depends on."""
        return {
            **dataclasses.asdict(row),
            "is_validation": self.is_validation,
            "calibration_images": self.calibration_images,
            "iterations": self.iterations,
            "scored_images": self.scored_images,
            "sources_sha256": hash_sources(),
        }


def measure(row: Row, settings: Settings, float_classes: dict[str, Sequence[int]] | None) -> dict:
    """Quantizes the network, writes its file and runs it; called once per process, whose peak memory it reports.

    Args:
      row: Row to measure.
      settings: Settings of the table.
      float_classes: {set: classes that the float network gives}; None for the float network itself.

    Returns:
      Top-1 and agreement with float in percent by set, seconds from the float network to a checked file, peak memory
      of the process in MiB while it quantizes, and the notes of the methods.
    """
    sets = _load_sets(settings)
    network = load_network(settings.data_dir)
    started = time.monotonic()
    file, notes = _write_file(row, network, sets.calibration.images, settings.iterations)
    seconds = time.monotonic() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if row.method.startswith(AI_EDGE):
        file = ai_edge.store_as_int8(file)
    result = {"seconds": round(seconds, 1), "peak_memory_mib": peak_mib, "notes": notes}
    for name in SETS:
        photographs = getattr(sets, name)
        classes = np.argmax(tflite.predict(file, photographs.images), axis=1)
        result[f"{name}_top1_percent"] = _percent(classes == photographs.classes)
        if float_classes is None:
            result[f"{name}_classes"] = classes.tolist()
        else:
            result[f"{name}_agreement_percent"] = _percent(classes == np.array(float_classes[name]))
    return result


def _load_sets(settings):
    load = load_validation_sets if settings.is_validation else load_test_sets
    sets = load(settings.data_dir, settings.calibration_images)
    count = settings.scored_images
    parts = {name: getattr(sets, name) for name in SETS}
    return sets._replace(**{name: Photographs(*(array[:count] for array in part)) for name, part in parts.items()})


def _write_file(row, network, images, iterations):
    """(file, notes) of a row."""
    if row.method == FLOAT:
        return tflite.convert_float(network), []
    per_channel = row.granularity == "per_channel"
    if row.method.startswith(AI_EDGE):
        float_file = tflite.convert_float(network)
        return ai_edge.quantize(float_file, row.method.removeprefix(AI_EDGE), row.bits, per_channel, images), []
    options = {"activation_bits": row.activation_bits, "iterations": iterations, "progress": True}
    quantized = ptq.quantize(network, row.method, row.bits, per_channel, images, **options)
    return tflite.convert(quantized, inference_type="float32"), list(quantized.quantization_notes)


def _percent(matches):
    return round(100 * float(np.mean(matches)), 3)


def hash_sources() -> str:
    """SHA-256 of the library and of this harness."""
    digest = hashlib.sha256(provenance.sources_sha256().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
