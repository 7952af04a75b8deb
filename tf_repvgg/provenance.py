"""What a result was made by: the machine, and the state of this package."""

import hashlib
import os
import platform
from pathlib import Path

import tensorflow as tf


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


def sources_sha256() -> str:
    """Tells one state of this package from another: the hash of its Python files, names included."""
    folder, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()
