"""Writes the crafted model files of the tests: a program, since it needs Keras.

python write_crafted.py FOLDER makes a folder for each, and FOLDER/index.json.
"""

import json
import sys
from pathlib import Path

from harness.commands import ROOT

sys.path.append(str(ROOT / "tests"))

from helpers.hostile_models import HOSTILE_MODELS, Workshop


def main() -> None:
    """Writes all files."""
    root = Path(sys.argv[1])
    entries = []
    for number, (name, hostile) in enumerate(HOSTILE_MODELS.items()):
        folder = root / str(number)
        folder.mkdir()
        workshop = Workshop(folder)
        path = hostile.write(workshop)
        workshop.sentinel.unlink(missing_ok=True)  # in case that Keras has run it while the file was made
        paths = {"file": str(path), "folder": str(folder), "sentinel": str(workshop.sentinel)}
        entries.append({"name": name, **paths})
    (root / "index.json").write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
