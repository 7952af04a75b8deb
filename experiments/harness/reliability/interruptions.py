"""Kills and signals at random moments: each work, interrupted and started again, ends as if nothing had happened."""

import signal
import subprocess

import numpy as np

from harness.reliability.fingerprints import take_fingerprint
from harness.reliability.programs import Arena, Work, renew_folder, start_process, wait_for
from harness.reliability.verdicts import ACCEPTED, HANG_SECONDS, LOST, Verdict, judge

_INTERRUPTIONS_OF_A_CHAIN = 4
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGNALLED = tuple(128 + number for number in _SIGNALS)
# Python itself starts before.
_IMPORTING_SECONDS = (0.3, 5)


class Interruptions:
    """Interrupts works at random moments.

    Args:
      arena: Where programs run.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._folder = arena.path / "interrupted"
        self._expected: dict[str, tuple[dict[str, str], float, int]] = {}

    def kill(self, work: Work, random: np.random.Generator) -> list[Verdict]:
        """Kills a work several times, and completes it: one verdict for each kill."""
        folder = renew_folder(self._folder)
        attacks = []
        while len(attacks) < _INTERRUPTIONS_OF_A_CHAIN:
            moment = self._draw_moment(work, folder, random)
            outcome = self._arena.programs.run(*work.fill(folder, self._arena.prepared), kill=moment)
            if outcome.status != -signal.SIGKILL:
                if not outcome.status:
                    break  # done before its last kill
                return [
                    *self._judge_end(f"kill: {work.name}", work, folder, attacks),
                    judge(f"kill: {work.name}", outcome, f"after {attacks}", ()),
                ]
            attacks.append(_describe(moment))
        return self._judge_end(f"kill: {work.name}", work, folder, attacks)

    def send_signals(self, work: Work, random: np.random.Generator) -> list[Verdict]:
        """Sends a work several signals, and completes it: one verdict for each signal."""
        folder = renew_folder(self._folder)
        kind = f"signal: {work.name}"
        verdicts = []
        for _ in range(_INTERRUPTIONS_OF_A_CHAIN):
            number = int(random.choice(_SIGNALS))
            moment = {**self._draw_moment(work, folder, random), "number": number}
            command = work.fill(folder, self._arena.prepared)
            limit = int(self._expect(work)[1] + HANG_SECONDS)
            outcome = self._arena.programs.run(*command, kill=moment, seconds=limit)
            verdicts.append(judge(kind, outcome, _describe(moment), _SIGNALLED))
            if not outcome.status:
                break
        (end,) = self._judge_end(kind, work, folder, [str([verdict.attack for verdict in verdicts])])
        return verdicts if end.outcome == ACCEPTED else [*verdicts[:-1], end]

    def signal_imports(self, work: Work, random: np.random.Generator, number: int) -> list[Verdict]:
        """Sends signals to processes of their own within the seconds of their imports: a verdict for each."""
        return [self._signal_import(work, random) for _ in range(number)]

    def _signal_import(self, work, random):
        folder = renew_folder(self._folder)
        stderr = self._arena.path / "output" / "importing.err"
        number, seconds = int(random.choice(_SIGNALS)), float(random.uniform(*_IMPORTING_SECONDS))
        process = start_process(work.fill(folder, self._arena.prepared), stderr)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        outcome = wait_for(process, stderr, HANG_SECONDS)
        return judge("signal: while importing", outcome, f"signal {number} after {seconds:.2f} s", _SIGNALLED)

    def _draw_moment(self, work, folder, random):
        _, seconds, touches = self._expect(work)
        if not touches or random.random() < 0.5:
            return {"seconds": float(random.uniform(0, seconds))}
        delay = float(random.choice([0, random.uniform(0, 0.1)]))
        return {"folder": str(folder), "event": int(random.integers(1, touches + 1)), "seconds": delay}

    def _expect(self, work):
        """Fingerprint, seconds and touches of an uninterrupted run, which runs when it is first needed."""
        if work.name not in self._expected:
            folder = renew_folder(self._arena.path / "uninterrupted")
            outcome = self._arena.complete(work, folder)
            self._expected[work.name] = take_fingerprint(folder), outcome.seconds, outcome.touches
        return self._expected[work.name]

    def _judge_end(self, kind, work, folder, attacks):
        detail = self._arena.find_loss(work, folder, self._expect(work)[0])
        return [Verdict(kind, LOST if detail else ACCEPTED, attack, detail) for attack in attacks]


def _describe(moment):
    place = f"touch {moment['event']}, and " if "event" in moment else ""
    signal_name = f"signal {moment['number']}, " if "number" in moment else ""
    return f"{signal_name}{place}{moment['seconds']:.3f} s"
