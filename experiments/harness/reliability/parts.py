"""The parts of the experiment, as pieces that are kept, within a limit of time."""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.commands import ROOT
from harness.reliability import crafted
from harness.reliability.interruptions import Interruptions
from harness.reliability.mutations import Mutations
from harness.reliability.programs import SHORT_EXPORT, SHORT_TRAINING, WORKS, Arena
from harness.reliability.races import RACED_WORKS, Races
from harness.reliability.verdicts import Verdict, from_records, summarize, to_records
from harness.reliability.write_points import WritePoints
from tf_repvgg import provenance
from tf_repvgg.storage import FinishedWork

# One piece of three sends signals to a process that imports.
_SIGNALS_OF_A_PIECE = 4
_SIZES_OF_DISKS = 10
_ROUNDS_AT_ONCE = 4
# Mutations of one piece for readers, for flags of programs, and for files of programs, and their order.
_READS, _STARTS = 100, 20
_ROUND_OF_MUTATIONS = ("read", "flags", "flags", "read", "flags", "read", "flags", "files")

Piece = tuple[str, Callable[[], list[Verdict]]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is tried.

    Attributes:
      seed: Seed of all that is random.
      kills: Number of kills.
      signals: Number of signals.
      mutations: Number of mutations.
    """

    seed: int
    kills: int
    signals: int
    mutations: int


def _list_kills(arena: Arena, size: Size) -> Iterator[Piece]:
    interruptions = Interruptions(arena)
    for index in itertools.count():
        random = np.random.default_rng([size.seed, 3, index])
        yield f"{index:04}", partial(interruptions.kill, WORKS[index % len(WORKS)], random)


def _list_signals(arena: Arena, size: Size) -> Iterator[Piece]:
    interruptions = Interruptions(arena)
    for index in itertools.count():
        random = np.random.default_rng([size.seed, 4, index])
        work = WORKS[index % len(WORKS)]
        if index % 3:
            yield f"{index:04}", partial(interruptions.send_signals, work, random)
        else:
            yield f"{index:04}", partial(interruptions.signal_imports, work, random, _SIGNALS_OF_A_PIECE)


def _list_write_points(arena: Arena, size: Size) -> Iterator[Piece]:
    for work in (SHORT_EXPORT, SHORT_TRAINING):
        points = WritePoints(arena, work)
        for number in range(1, points.count + 1):
            yield f"{work.name}/{number:03}", partial(points.fail, number)


def _list_disks(arena: Arena, size: Size) -> Iterator[Piece]:
    for work in (SHORT_TRAINING, SHORT_EXPORT):
        yield work.name, partial(WritePoints(arena, work).fill_disks, _SIZES_OF_DISKS)


def _list_races(arena: Arena, size: Size) -> Iterator[Piece]:
    with Races(arena) as races:
        for index in range(_ROUNDS_AT_ONCE):
            for work in RACED_WORKS:
                yield f"{work.name}/{index}", partial(races.run, work, 2 + index % 2)


def _list_crafted(arena: Arena, size: Size) -> Iterator[Piece]:
    yield "crafted", partial(crafted.judge_crafted_files, arena)


def _list_mutations(arena: Arena, size: Size) -> Iterator[Piece]:
    mutations = Mutations(arena, size.seed)
    counts = dict.fromkeys(_ROUND_OF_MUTATIONS, 0)
    for name in itertools.cycle(_ROUND_OF_MUTATIONS):
        first = counts[name]
        counts[name] += _READS if name == "read" else _STARTS
        numbers = range(first, counts[name])
        if name == "read":
            yield f"{name}/{first:05}", partial(mutations.read, numbers.start, numbers.stop)
        else:
            attack = mutations.set_flags if name == "flags" else mutations.give_file
            yield f"{name}/{first:05}", partial(_map, attack, numbers)


def _map(attack, numbers):
    return [attack(number) for number in numbers]


# {part: (pieces, number of attacks after which it ends; None for all pieces)}
_PARTS: dict[str, tuple[Callable[[Arena, Size], Iterator[Piece]], Callable[[Size], int | None]]] = {
    "kills": (_list_kills, lambda size: size.kills),
    "signals": (_list_signals, lambda size: size.signals),
    "write_points": (_list_write_points, lambda size: None),
    "disks": (_list_disks, lambda size: None),
    "at_once": (_list_races, lambda size: None),
    "crafted": (_list_crafted, lambda size: None),
    "mutations": (_list_mutations, lambda size: size.mutations),
}
PART_NAMES = tuple(_PARTS)


def run_part(name: str, arena: Arena, size: Size, kept: FinishedWork, deadline: float) -> dict[str, Any]:
    """Runs a part until it is done, or there is no time left.

    Args:
      name: One of `PART_NAMES`.
      arena: Where programs run.
      size: How much is tried.
      kept: Pieces of earlier runs, which are taken if neither the programs nor this harness have changed.
      deadline: Time, as `time.monotonic` gives it, after which no piece begins.

    Returns:
      Rows by kind, see `verdicts.summarize`, whether the part is complete, the seed, and a hash of the sources.
    """
    list_pieces, find_target = _PARTS[name]
    target = find_target(size)
    inputs = {"seed": size.seed, "sources_sha256": hash_sources()}
    verdicts: list[Verdict] = []
    is_complete = True
    with tqdm(desc=name, total=target, unit="attack") as bar:
        for piece, attack in list_pieces(arena, size):
            if target is not None and len(verdicts) >= target:
                break
            result = kept.find(f"{name}/{piece}", inputs)
            if result is None:
                if time.monotonic() > deadline:
                    is_complete = False
                    break
                result = kept.keep(f"{name}/{piece}", inputs, {"verdicts": to_records(attack())})
            judged = from_records(result["verdicts"])
            verdicts += judged
            bar.update(len(judged))
    return {"rows": summarize(verdicts), "is_complete": is_complete, **inputs}


def hash_sources() -> str:
    """SHA-256 of the library, of the programs, and of what attacks them."""
    digest = hashlib.sha256(provenance.sources_sha256().encode())
    for folder in ("train", "export", "experiments/harness/reliability", "tests/helpers"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
