"""Runs the project's two command lines as a user would, and reads what they leave."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _run(script, *arguments, **flags):
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    print(f"\n$ python {script} {' '.join((*arguments, *words))}", flush=True)
    subprocess.run([sys.executable, ROOT / script, *arguments, *words], cwd=ROOT, check=True)


def train(config, workdir, **flags) -> dict:
    """Trains configs/<config>.flags in `workdir`, unless that is done already; returns its result.json.

    Without further flags, a finished run that is committed in results/checkpoints is taken as it is.
    """
    committed = ROOT / "results" / "checkpoints" / config
    if committed.exists() and not (ROOT / workdir).exists() and not flags.keys() - {"data_dir"}:
        shutil.copytree(committed, ROOT / workdir)
    if not (ROOT / workdir / "result.json").exists():
        _run("train/main.py", f"--flagfile=configs/{config}.flags", workdir=workdir, **flags)
    return json.loads((ROOT / workdir / "result.json").read_text(encoding="utf-8"))


def export(workdir, **flags) -> dict:
    """Exports a trained run, unless that is done already; returns its export.json."""
    path = ROOT / workdir / "export" / "export.json"
    if not path.exists():
        _run("export/main.py", workdir=workdir, **flags)
    return json.loads(path.read_text(encoding="utf-8"))
