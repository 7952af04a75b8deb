"""Runs the project's two command lines as a user would, and reads the results that they write."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tf_repvgg import cli, runs, storage

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "results" / "checkpoints"


class Diverged(SystemExit):
    """The training program has reported weights that are not finite."""


def train(config, workdir, **flags) -> dict:
    """Returns the result.json of the finished run of configs/<config>.flags in `workdir`; trains what is missing.

    A finished run that is committed in results/checkpoints is copied to the workdir first, if the workdir does not
    exist and no flag changes the run. Then the training program starts in every case: it refuses a workdir that holds a
    run with other flags, evaluates a finished run again, and trains or continues any other.

    Args:
      config: Name of a file in configs/, without .flags.
      workdir: Folder of the run, absolute or relative to the repository.
      **flags: Further flags of train/main.py; those that are None are left out.

    Raises:
      Diverged: If training diverges.
      SystemExit: If the program fails for another reason, which it has printed.
    """
    _copy_committed_run(config, workdir, flags)
    _run("train/main.py", f"--flagfile=configs/{config}.flags", workdir=workdir, **flags)
    return _read(ROOT / workdir / "result.json")


def export(workdir, **flags) -> dict:
    """Returns the export.json of a trained run; exports the run unless the folder holds just this export.

    Args:
      workdir: Folder of the run, absolute or relative to the repository.
      **flags: Further flags of export/main.py. The export goes to `output`, by default the folder "export" of the run.

    Raises:
      SystemExit: If the program fails, for a reason which it has printed.
    """
    path = ROOT / flags.get("output", f"{workdir}/export") / "export.json"
    requested = {name: str(value) for name, value in flags.items() if name != "data_dir"}
    if path.exists() and _is_export_of(export := _read(path), ROOT / workdir, requested):
        return export
    _run("export/main.py", workdir=workdir, **flags)
    return _read(path)


def _copy_committed_run(config, workdir, flags):
    committed, copy = CHECKPOINTS / config, ROOT / workdir
    if committed.exists() and not copy.exists() and not flags.keys() - {"data_dir"}:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_write(copy) as temporary:
            shutil.copytree(committed, temporary)


def _is_export_of(export, workdir, flags):
    """Whether an export.json is of this model and these flags, and has each file's layers, unlike earlier versions."""
    is_whole = all("layers" in file for file in export["files"])
    is_of_model = export["model_sha256"] == runs.model_sha256(workdir)
    return is_whole and is_of_model and flags.items() <= export["flags"].items()


def _run(script, *arguments, **flags):
    options = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    print(f"\n$ python {script} {' '.join((*arguments, *options))}", flush=True)
    status = subprocess.run([sys.executable, ROOT / script, *arguments, *options], cwd=ROOT).returncode
    if status == cli.DIVERGED:
        raise Diverged(status)
    if status:
        sys.exit(status)  # the program has printed the reason


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))
