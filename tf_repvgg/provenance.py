"""Where a result comes from: the machine that it was measured on, and the state of this package."""

import hashlib
import os
import platform
from pathlib import Path

import tensorflow as tf


def machine() -> dict[str, str | int | None]:
    """The machine and the versions that a measurement depends on, JSON-serializable.

    Example:
      >>> from tf_repvgg import provenance
      >>> list(provenance.machine())
      ['cpu', 'cores', 'python', 'tensorflow']
    """
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know the name of the processor
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
    }


def sources_sha256() -> str:
    """The SHA-256 of this package's Python files and their names: it changes with every change of the code.

    Example:
      >>> from tf_repvgg import provenance
      >>> len(provenance.sources_sha256())
      64
    """
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
