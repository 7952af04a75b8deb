"""Two and three processes at once with the same folder: one works, the others are refused in one line or wait."""

import concurrent.futures

from harness.reliability.fingerprints import describe_difference, take_fingerprint
from harness.reliability.programs import (
    SHORT_EXPORT,
    SHORT_TRAINING,
    WORKS,
    Arena,
    ForkedPrograms,
    renew_folder,
)
from harness.reliability.verdicts import ACCEPTED, LOST, Verdict, judge

PREPARING_DATA = next(work for work in WORKS if work.name == "preparing data")
_RACERS = 3


def run_at_once(arena: Arena, rounds: int) -> list[Verdict]:
    """Runs works at once, alternately by two and by three processes; one verdict for each process.

    Args:
      arena: Where programs run.
      rounds: Number of rounds of each work.
    """
    verdicts: list[Verdict] = []
    servers = [ForkedPrograms(renew_folder(arena.path / "output" / f"racer{number}")) for number in range(_RACERS)]
    with concurrent.futures.ThreadPoolExecutor(_RACERS) as pool:
        for work in (SHORT_TRAINING, SHORT_EXPORT, PREPARING_DATA):
            folder = renew_folder(arena.path / "uninterrupted")
            arena.complete(work, folder)
            expected = take_fingerprint(folder)
            for number in range(rounds):
                racers = servers[: 2 + number % 2]
                folder = renew_folder(arena.path / "interrupted")
                command = work.fill(folder, arena.prepared)
                outcomes = list(pool.map(lambda server, command=command: server.run(*command), racers))
                attack = f"{len(racers)} at once, round {number}"
                judged = [judge(f"at once: {work.name}", outcome, attack) for outcome in outcomes]
                difference = describe_difference(take_fingerprint(folder), expected)
                if difference or not any(verdict.outcome == ACCEPTED for verdict in judged):
                    detail = f"other content than of one process: {difference}" if difference else "no process worked"
                    judged[0] = Verdict(judged[0].kind, LOST, attack, detail)
                verdicts += judged
    for server in servers:
        server.__exit__(None, None, None)
    return verdicts
