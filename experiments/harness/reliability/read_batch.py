"""Gives mutated files to the library's readers: a program, so that a reader that hangs or dies ends only this process.

python read_batch.py MATERIALS SANDBOX VERDICTS SEED FIRST LAST judges mutations FIRST to LAST - 1, each drawn from the
seed and its number. Before each it appends its kind to VERDICTS, and its verdict after it, both as lines of JSON.
python read_batch.py MATERIALS RUN INTEGER_FILE makes the materials.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from harness.reliability.fingerprints import hash_files
from harness.reliability.mutators import choose_mutator
from harness.reliability.readers import Reader, Readers, make_materials
from harness.reliability.verdicts import ACCEPTED, HANG_SECONDS, LOST, REFUSED, TRACEBACK


def judge(reader: Reader, sandbox: Path, path: Path) -> tuple[str, str]:
    """Outcome and message of reading a file."""
    before = hash_files(sandbox)
    signal.alarm(HANG_SECONDS)
    try:
        reader.read(sandbox, path)
        outcome, message = ACCEPTED, ""
    except (ValueError, OSError) as error:  # what programs print in one line
        outcome, message = REFUSED, str(error)
    except BaseException as error:
        outcome, message = TRACEBACK, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if hash_files(sandbox) != before:
        return LOST, f"the reader changed files; {message}"
    return (outcome, message) if outcome != REFUSED or message.strip() else (TRACEBACK, "an error without a message")


def run_batch(materials: Path, sandbox: Path, verdicts: Path, seed: int, numbers: range) -> None:
    """Judges the mutations of some numbers."""
    table = Readers().table
    names = list(table)
    weights = np.array([table[name].weight for name in names])
    shutil.rmtree(sandbox, ignore_errors=True)
    shutil.copytree(materials, sandbox)
    with verdicts.open("a", encoding="utf-8") as file:
        for number in numbers:
            random = np.random.default_rng([seed, number])
            name = names[int(random.choice(len(names), p=weights / weights.sum()))]
            paths = sorted(path for path in sandbox.glob(table[name].files) if path.is_file())
            path = paths[int(random.integers(len(paths)))]
            content = path.read_bytes()
            path.write_bytes(choose_mutator(path.name)(content, random))
            print(json.dumps({"kind": name}), file=file, flush=True)
            outcome, message = judge(table[name], sandbox, path)
            print(json.dumps({"kind": name, "outcome": outcome, "detail": message[:300]}), file=file, flush=True)
            if outcome == LOST:
                shutil.rmtree(sandbox)
                shutil.copytree(materials, sandbox)
            else:
                path.write_bytes(content)


def main() -> None:
    """Makes materials, or judges mutations, as the arguments say."""
    if len(sys.argv) == 4:
        make_materials(*map(Path, sys.argv[1:]))
        Readers().check(Path(sys.argv[1]))
        return
    materials, sandbox, verdicts = map(Path, sys.argv[1:4])
    seed, first, last = map(int, sys.argv[4:])
    run_batch(materials, sandbox, verdicts, seed, range(first, last))


if __name__ == "__main__":
    main()
