"""Runs the project's two command lines as a user would, and reads what they leave."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tf_repvgg import cli, runs, storage

ROOT = Path(__file__).resolve().parents[2]


class Diverged(SystemExit):
    """Training came to numbers that are not finite, and has said so."""


def _run(script, *arguments, **flags):
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    print(f"\n$ python {script} {' '.join((*arguments, *words))}", flush=True)
    status = subprocess.run([sys.executable, ROOT / script, *arguments, *words], cwd=ROOT).returncode
    if status == cli.DIVERGED:
        raise Diverged(status)
    if status:
        sys.exit(status)  # the program has said why


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def train(config, workdir, **flags) -> dict:
    """Trains configs/<config>.flags in `workdir`, or continues there; returns its result.json.

    A finished run is only evaluated again; one with other flags is refused. Without further flags, a finished run that
    is committed in results/checkpoints is taken as it is.

    Raises:
      Diverged: if the program says so.
    """
    committed = ROOT / "results" / "checkpoints" / config
    if committed.exists() and not (ROOT / workdir).exists() and not flags.keys() - {"data_dir"}:
        (ROOT / workdir).parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_write(ROOT / workdir) as temporary:
            shutil.copytree(committed, temporary)
    _run("train/main.py", f"--flagfile=configs/{config}.flags", workdir=workdir, **flags)
    return _read(ROOT / workdir / "result.json")


def export(workdir, **flags) -> dict:
    """Exports a trained run, unless just that was done already; returns its export.json.

    It is in the folder `output` if that is among the flags, by default in "export" in the workdir.
    """
    path = ROOT / flags.get("output", f"{workdir}/export") / "export.json"
    asked = {name: str(value) for name, value in flags.items() if name != "data_dir"}
    if path.exists() and _answers(found := _read(path), ROOT / workdir, asked):
        return found
    _run("export/main.py", workdir=workdir, **flags)
    return _read(path)


def _answers(found, workdir, asked):
    """Whether an export.json is of this model and these flags, and tells of layers, as earlier versions did not."""
    is_whole = all("layers" in file for file in found["files"])
    return is_whole and found["model_sha256"] == runs.model_sha256(workdir) and asked.items() <= found["flags"].items()
