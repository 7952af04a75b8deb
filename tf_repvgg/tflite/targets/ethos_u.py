"""Arm Ethos-U: files compiled by Vela, and its estimates."""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tf_repvgg.tflite import flatbuffer
from tf_repvgg.tflite.targets.base import Built, integer_weights, optional_module

PACKAGE, MODULE = "ethos-u-vela", "ethosu.vela"
ACCELERATORS = (
    *(f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)),
    *(f"ethos-u65-{macs}" for macs in (256, 512)),
    *(f"ethos-u85-{macs}" for macs in (128, 256, 512, 1024, 2048)),
)
_KIB = 1024
# Columns of Vela's summary: (key, column, factor); bytes are whole.
_COLUMNS = (
    ("inference_ms_estimated", "inference_time", 1000),
    ("sram_bytes", "sram_memory_used", _KIB),
    ("flash_bytes", "off_chip_flash_memory_used", _KIB),
    ("encoded_weight_bytes", "total_npu_encoded_weights", 1),
    ("cycles_estimated", "cycles_total", 1),
)


def build(file: bytes, accelerator: str) -> Built:
    """Compiles a file for one accelerator with Vela's default system and memory.

    Raises:
      ValueError: without the package ethos-u-vela, for a file that is not fully integer, and if Vela refuses it.
    """
    optional_module(MODULE, PACKAGE)
    raw = sum(each.codes.size for each in integer_weights(flatbuffer.unpack(file)))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.tflite"
        source.write_bytes(file)
        words = ["--accelerator-config", accelerator, "--output-dir", folder, str(source)]
        command = [sys.executable, "-c", "import sys; from ethosu.vela.vela import main; sys.exit(main())", *words]
        outcome = subprocess.run(command, capture_output=True, text=True)
        compiled = Path(folder) / "model_vela.tflite"
        if outcome.returncode or not compiled.exists():
            lines = (outcome.stdout + outcome.stderr).strip().splitlines()
            raise ValueError(f"Vela refused the file: {lines[-1] if lines else 'it said nothing'}")
        (summary,) = Path(folder).glob("model_summary_*.csv")
        with summary.open(newline="", encoding="utf-8") as rows:
            (row,) = csv.DictReader(rows)
        facts = {key: _number(float(row[column]) * factor, key) for key, column, factor in _COLUMNS}
        content = compiled.read_bytes()
    facts |= {
        "raw_weight_bytes": raw,
        "encoded_over_raw": round(facts["encoded_weight_bytes"] / raw, 4),
        **_split(outcome.stdout),
        "file_bytes": len(content),
    }
    return Built({f"_{accelerator.replace('-', '_')}_vela.tflite": content}, facts)


def _number(value, key):
    return round(value) if key.endswith("_bytes") else round(value, 4)


def _split(printed):
    """Operators by where they run, of what Vela prints."""
    found = {}
    for key, words in {"cpu_operators": "CPU operators", "npu_operators": "NPU operators"}.items():
        match = re.search(rf"{words}\s*=\s*(\d+)", printed)
        found[key] = int(match[1]) if match else None
    return found
