"""Two and three processes at once with the same folder: one works, the others are refused in one line or wait."""

import concurrent.futures
import contextlib
from types import TracebackType

from harness.reliability.fingerprints import describe_difference, take_fingerprint
from harness.reliability.programs import SHORT_EXPORT, SHORT_TRAINING, WORKS, Arena, ForkedPrograms, Work, renew_folder
from harness.reliability.verdicts import ACCEPTED, LOST, Verdict, judge

_RACERS = 3
RACED_WORKS = (SHORT_TRAINING, SHORT_EXPORT, next(work for work in WORKS if work.name == "preparing data"))


class Races:
    """Runs works several times at once; a context manager that ends the processes that it forks from.

    Args:
      arena: Where programs run.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._stack = contextlib.ExitStack()
        self._servers = [
            self._stack.enter_context(ForkedPrograms(renew_folder(arena.path / "output" / f"racer{number}")))
            for number in range(_RACERS)
        ]
        self._pool = self._stack.enter_context(concurrent.futures.ThreadPoolExecutor(_RACERS))
        self._expected: dict[str, dict[str, str]] = {}

    def __enter__(self) -> "Races":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, work: Work, racers: int) -> list[Verdict]:
        """Runs a work that many times at once: one verdict for each process."""
        expected = self._expect(work)
        folder = renew_folder(self._arena.path / "interrupted")
        command = work.fill(folder, self._arena.prepared)
        outcomes = list(self._pool.map(lambda server: server.run(*command), self._servers[:racers]))
        attack = f"{racers} at once"
        verdicts = [judge(f"at once: {work.name}", outcome, attack) for outcome in outcomes]
        difference = describe_difference(take_fingerprint(folder), expected)
        if difference or not any(verdict.outcome == ACCEPTED for verdict in verdicts):
            detail = f"other content than of one process: {difference}" if difference else "no process worked"
            verdicts[0] = Verdict(verdicts[0].kind, LOST, attack, detail)
        return verdicts

    def _expect(self, work):
        if work.name not in self._expected:
            folder = renew_folder(self._arena.path / "uninterrupted")
            self._arena.complete(work, folder)
            self._expected[work.name] = take_fingerprint(folder)
        return self._expected[work.name]
