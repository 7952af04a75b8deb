"""Arm Ethos-U: files compiled by Vela, and Vela's estimates."""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    """Compiles a file for one accelerator, with Vela's default system and memory configuration.

    Args:
      file: Fully integer file.
      accelerator: One of `ACCELERATORS`.

    Raises:
      ValueError: If the package ethos-u-vela is not installed, the file is not fully integer, or Vela refuses it.
    """
    optional_module(MODULE, PACKAGE)
    raw_weight_bytes = sum(weights.codes.size for weights in integer_weights(flatbuffer.unpack(file)))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.tflite"
        source.write_bytes(file)
        arguments = ["--accelerator-config", accelerator, "--verbose-performance", "--output-dir", folder, str(source)]
        program = "import sys; from ethosu.vela.vela import main; sys.exit(main())"
        outcome = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        compiled = Path(folder) / "model_vela.tflite"
        if outcome.returncode or not compiled.exists():
            lines = (outcome.stdout + outcome.stderr).strip().splitlines()
            raise ValueError(f"Vela refused the file: {lines[-1] if lines else 'it printed nothing'}")
        (summary,) = Path(folder).glob("model_summary_*.csv")
        (row,) = _read_table(summary)
        operators = _read_table(Path(folder) / "model_per-layer.csv")
        record: dict[str, Any] = {key: _round(float(row[column]) * factor, key) for key, column, factor in _COLUMNS}
        content = compiled.read_bytes()
    record |= {
        "raw_weight_bytes": raw_weight_bytes,
        "encoded_over_raw": round(record["encoded_weight_bytes"] / raw_weight_bytes, 4),
        "cpu_operators": _read_count("CPU operators", outcome.stdout),
        "npu_operators": _read_count("NPU operators", outcome.stdout),
        "layers": [_describe_operator(operator) for operator in operators],
        "file_bytes": len(content),
    }
    return Built({f"_{accelerator.replace('-', '_')}_vela.tflite": content}, record)


def _read_table(path):
    with path.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def _describe_operator(row):
    """Cycles of an operator, and bytes that it reads from flash: its weights as encoded, scales and biases."""
    flash_bytes = sum(int(float(row[column])) for column in ("OnFlash AC", "OffFlash AC"))
    return {"operator": row["Name"], "flash_bytes": flash_bytes, "cycles_estimated": int(float(row["Op Cycles"]))}


def _round(value, key):
    return round(value) if key.endswith("_bytes") else round(value, 4)


def _read_count(label, log):
    match = re.search(rf"{label}\s*=\s*(\d+)", log)
    return int(match[1]) if match else None
