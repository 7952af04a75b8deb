"""Crafted model files, those of the tests: none may run code, read other files, fill memory, or hang."""

import json
import shutil
from pathlib import Path

from harness.reliability.programs import Arena, renew_folder
from harness.reliability.verdicts import CODE_RUN, HANG_SECONDS, Verdict, judge

# Ways of such a file into a program.
_COMMANDS = {
    "export --init_from": ("export/main.py", "--outliers_only", "--init_from={file}"),
    "train --init_from": ("train/main.py", "--epochs=1", "--workdir={folder}/new", "--init_from={file}"),
    "train --distill_from": ("train/main.py", "--epochs=1", "--workdir={folder}/new", "--distill_from={file}"),
}
_WRITER = "experiments/harness/reliability/write_crafted.py"
# A file that takes more than this is found out: the process that reads it has no more.
_MEMORY_BYTES = 16 * 2**30


def judge_crafted_files(arena: Arena) -> list[Verdict]:
    """Gives each crafted file to each program that takes model files."""
    folder = renew_folder(arena.path / "crafted")
    written = arena.programs.run(_WRITER, folder, import_from="experiments")
    if written.status:
        raise RuntimeError(f"writing crafted files failed: {written.stderr[-1000:]}")
    verdicts = []
    for entry in json.loads((folder / "index.json").read_text(encoding="utf-8")):
        shutil.copy(arena.prepared / "run" / "input.json", entry["folder"])
        for kind, command in _COMMANDS.items():
            places = {"file": entry["file"], "folder": entry["folder"]}
            program, *arguments = (part.format_map(places) for part in command)
            outcome = arena.programs.run(program, *arguments, seconds=HANG_SECONDS, memory=_MEMORY_BYTES)
            verdict = judge(f"crafted: {kind}", outcome, entry["name"])
            if Path(entry["sentinel"]).exists():
                verdict = Verdict(verdict.kind, CODE_RUN, entry["name"], verdict.detail)
            verdicts.append(verdict)
    return verdicts
