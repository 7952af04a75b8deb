"""Mutated files and flags: given to the library's readers in batches, and to the programs one by one."""

import json
import os
import re
import shutil
import signal

import numpy as np

from harness.commands import ROOT
from harness.reliability.fingerprints import hash_files
from harness.reliability.mutators import choose_mutator, draw_flag_value
from harness.reliability.programs import SHORT_EXPORT, Arena, renew_folder
from harness.reliability.verdicts import ACCEPTED, DEATH, HANG, HANG_SECONDS, LOST, Verdict, judge

_BATCH = "experiments/harness/reliability/read_batch.py"
_BATCH_SECONDS = 600
_MEMORY_BYTES = 16 * 2**30

# The last check of each program refuses these folders, so that a program that has accepted all others ends soon.
_TRAIN = ("train/main.py", "--epochs=1", "--novalidation", "--workdir={file}/last")
_EXPORT_FILE = (
    "export/main.py",
    "--ptq=min_max",
    "--output={file}/last",
    "--calibration_images=16",
    "--latency_runs=0",
)
_EXPORT = (*_EXPORT_FILE, "--workdir={run}")
_BENCHMARK = ("export/benchmark.py", "--files={integer}", "--runs=10", "--warmup_runs=0", "--output={file}/last")
_LAST_CHECK = "last' cannot be written to"
# Counts of what a program was told to do for as long as it takes.
_LENGTHS = ("runs", "warmup_runs")

# Those of the prepared run.
_SETTINGS = ("--epochs=1", "--batch_size=256", "--deterministic")
# {kind: (command, file that is mutated)}
_FILES_OF_PROGRAMS = {
    "train --flagfile": ((*_TRAIN, "--flagfile={run}/config.flags"), "run/config.flags"),
    "train --init_from": ((*_TRAIN, "--init_from={run}"), "run/model.keras"),
    "train --distill_from": ((*_TRAIN, "--distill_from={run}"), "run/input.json"),
    "train --evaluate_only": (
        (
            "train/main.py",
            f"--flagfile={ROOT}/configs/digits_oabn.flags",
            *_SETTINGS,
            "--evaluate_only",
            "--workdir={run}",
        ),
        "run/model.keras",
    ),
    "export: input.json": (_EXPORT, "run/input.json"),
    "export: model.keras": (_EXPORT, "run/model.keras"),
    "export --init_from": (
        (*_EXPORT_FILE, "--dataset=digits", "--init_from={keras3}"),
        "foreign/keras3.keras",
    ),
    "export --init_from, PyTorch": (
        (*_EXPORT_FILE, "--dataset=digits", "--variant=digits", "--init_from={torch}"),
        "foreign/torch.safetensors",
    ),
    "export --labels": (
        (*_EXPORT_FILE, "--dataset=digits", "--labels={labels}", "--init_from={run}/model.keras"),
        "labels/labels.csv",
    ),
    "benchmark": (_BENCHMARK, "integer/file.tflite"),
    "benchmark --dataset": ((*_BENCHMARK, "--dataset=digits"), "integer/file.tflite"),
}


class Mutations:
    """Mutates files and flags, and judges what becomes of them.

    Args:
      arena: Where programs run.
      seed: Seed of the mutations; each is drawn from it and its number.
    """

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena, self._seed = arena, seed
        self._materials = arena.path / "materials"
        self._sandbox = arena.path / "sandbox" / "a" / "b"
        exported = renew_folder(arena.path / "uninterrupted")
        arena.complete(SHORT_EXPORT, exported)
        integer_file = exported / "export" / "int8_w8_per_channel_min_max.tflite"
        outcome = self._run_batch(self._materials, arena.prepared / "run", integer_file)
        if outcome.status:
            raise RuntimeError(f"making files to mutate failed: {outcome.stderr[-1000:]}")
        for base in (_TRAIN, _EXPORT, _BENCHMARK):
            verdict = self._run("as it is", base, self._renew_sandbox(), base[0])
            if verdict.outcome != ACCEPTED:
                raise RuntimeError(f"a command without mutations was not accepted: {verdict}")
        self._flags = {base[0]: self._list_flags(base[0]) for base in (_TRAIN, _EXPORT, _BENCHMARK)}

    def read(self, first: int, last: int) -> list[Verdict]:
        """Gives mutated files to readers: one verdict for each of the mutations `first` to `last - 1`."""
        path = self._arena.path / "output" / "verdicts.jsonl"
        path.unlink(missing_ok=True)
        verdicts: list[Verdict] = []
        while len(verdicts) < last - first:
            number = first + len(verdicts)
            outcome = self._run_batch(self._materials, self._sandbox, path, self._seed, number, last)
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            path.unlink()
            ended = [record for record in records if "outcome" in record]
            verdicts += [
                Verdict(f"file: {record['kind']}", record["outcome"], f"mutation {number + index}", record["detail"])
                for index, record in enumerate(ended)
            ]
            if len(verdicts) < last - first:  # the last one that began has ended the process
                kind = records[-1]["kind"] if records else "none"
                name = HANG if outcome.status == -signal.SIGALRM else DEATH
                detail = f"status {outcome.status}: {outcome.stderr[-200:]}"
                verdicts.append(Verdict(f"file: {kind}", name, f"mutation {first + len(verdicts)}", detail))
        return verdicts

    def set_flags(self, number: int) -> Verdict:
        """Starts a program with a mutated value of one of its flags."""
        random = np.random.default_rng([self._seed, 1, number])
        places = self._renew_sandbox()
        base = (_TRAIN, _EXPORT, _BENCHMARK)[int(random.choice(3, p=[0.5, 0.4, 0.1]))]
        flags = self._flags[base[0]]
        names = [list(flags)[int(index)] for index in random.integers(0, len(flags), int(random.choice([1, 1, 2, 3])))]
        values = [f"--{name}={draw_flag_value(*flags[name], random)}" for name in names]
        verdict = self._run(f"flags: {base[0]}", (*base, *values), places, f"number {number}, {' '.join(values)[:300]}")
        if verdict.outcome == HANG and set(names) & set(_LENGTHS):
            return Verdict(verdict.kind, ACCEPTED, verdict.attack)
        return verdict

    def give_file(self, number: int) -> Verdict:
        """Starts a program on a mutated file, or on a pipe, a device, a folder or a loop of links in its place."""
        random = np.random.default_rng([self._seed, 2, number])
        places = self._renew_sandbox()
        kinds = list(_FILES_OF_PROGRAMS)
        kind = kinds[int(random.integers(len(kinds)))]
        command, name = _FILES_OF_PROGRAMS[kind]
        path = self._sandbox / name
        content = path.read_bytes()
        path.unlink()
        if random.random() < 0.2:
            _SPECIAL_FILES[int(random.integers(len(_SPECIAL_FILES)))](path)
        else:
            path.write_bytes(choose_mutator(path.name)(content, random))
        return self._run(f"program: {kind}", command, places, f"number {number}")

    def _run(self, kind, command, places, attack):
        program, *arguments = (_fill(part, places) for part in command)
        before = hash_files(self._sandbox)
        limits = {"seconds": HANG_SECONDS + 5, "memory": _MEMORY_BYTES}
        outcome = self._arena.programs.run(ROOT / program, *arguments, cwd=str(self._sandbox), **limits)
        verdict = judge(kind, outcome, attack)
        if _LAST_CHECK in verdict.detail:
            verdict = Verdict(kind, ACCEPTED, verdict.attack)
        after = hash_files(self._sandbox)
        # A program that works writes result.json again.
        changed = [
            name
            for name, digest in before.items()
            if after.get(name) != digest and not (verdict.outcome == ACCEPTED and name.endswith("result.json"))
        ]
        return Verdict(kind, LOST, verdict.attack, f"changed: {', '.join(changed)}") if changed else verdict

    def _renew_sandbox(self):
        """{name: path} of what the values of flags may refer to."""
        sandbox = self._sandbox
        shutil.rmtree(sandbox, ignore_errors=True)
        shutil.copytree(self._materials, sandbox)
        for name in ("empty", "folder_of_pipe"):
            (sandbox / name).mkdir()
        (sandbox / "file").write_text("a file that nobody may change\n")
        os.mkfifo(sandbox / "pipe")
        os.mkfifo(sandbox / "folder_of_pipe" / "model.keras")
        os.mkfifo(sandbox / "folder_of_pipe" / "input.json")
        (sandbox / "loop").symlink_to(sandbox / "loop")
        names = ("empty", "folder_of_pipe", "file", "pipe", "loop", "run", "missing")
        return {
            **{name: str(sandbox / name) for name in names},
            "integer": str(sandbox / "integer" / "file.tflite"),
            "torch": str(sandbox / "foreign" / "torch.safetensors"),
            "labels": str(sandbox / "labels" / "labels.csv"),
            "keras3": str(sandbox / "foreign" / "keras3.keras"),
        }

    def _list_flags(self, program):
        """{flag: (values it may have if they are few, whether it is a number)}."""
        text = self._arena.programs.run(program, "--help").stdout
        flags = re.findall(r"^  -?-(\[no\])?(\w+): (?:<([^>]+)>)?(.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL)
        return {
            name: (
                ("true", "false") if switch else tuple(choices.split("|")) if choices else (),
                "a number" in description or "an integer" in description,
            )
            for switch, name, choices, description in flags
        }

    def _run_batch(self, *arguments):
        return self._arena.programs.run(_BATCH, *arguments, import_from="experiments", seconds=_BATCH_SECONDS)


def _fill(text, places):
    """Text with paths for {name}; other braces stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[0]), text)


_SPECIAL_FILES = (
    os.mkfifo,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/dev/full"),
)
