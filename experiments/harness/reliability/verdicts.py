"""Verdicts: how a program or a reader has met one attack."""

import dataclasses
import re
import signal
from collections.abc import Iterable, Mapping
from typing import Any

from harness.reliability.programs import Outcome

REFUSED, ACCEPTED = "refused in one line", "accepted"
TRACEBACK, HANG, DEATH = "traceback", "hang", "death by signal"
OTHER_STATUS, CODE_RUN, LOST = "other status", "code run", "data lost"
FAULTS = (TRACEBACK, OTHER_STATUS, HANG, DEATH, CODE_RUN, LOST)
OUTCOMES = (REFUSED, ACCEPTED, *FAULTS)

HANG_SECONDS = 30
_LONGEST_DETAIL = 300
# What a progress bar leaves in a terminal, what TFDS prints while it prepares a dataset, and the note of an export that
# continues.
_BARS = re.compile(
    r"\d+%\||\?(it|step|image|epoch|turn|layer|example|split)|\.\.\.:|[█▏▎▍▌▋▊▉]|it/s|: taken from the run that was"
)
_CURSOR_MOVES = re.compile(r"\x1b\[\d*[A-K]")  # of bars below each other


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one attack has ended.

    Attributes:
      kind: Kind of the attack, a row of the page.
      outcome: One of `OUTCOMES`.
      attack: Attack, so that it can be repeated.
      detail: Message, or what went wrong.
    """

    kind: str
    outcome: str
    attack: str = ""
    detail: str = ""


def find_message(outcome: Outcome) -> str | None:
    """The only line that a program has printed to stderr, beside progress bars; None if there are more or none."""
    text = _CURSOR_MOVES.sub("", outcome.stderr)
    lines = [line for part in text.splitlines() for line in part.split("\r") if line.strip()]
    messages = [line for line in lines if ": error: " in line or not _BARS.search(line)]
    return messages[0] if len(messages) == 1 and ": error: " in messages[0] else None


def judge(kind: str, outcome: Outcome, attack: str, statuses: Iterable[int] = (2,)) -> Verdict:
    """Judges a program by how it ended.

    Args:
      kind: Kind of the attack.
      outcome: How it ended.
      attack: Attack, so that it can be repeated.
      statuses: Exit statuses of a refusal.
    """
    message = find_message(outcome)
    detail = message or outcome.stderr.strip()
    if outcome.status == -signal.SIGALRM:
        name = HANG
    elif outcome.status < 0:
        name = DEATH
    elif "Traceback (most recent call last)" in outcome.stderr:
        name = TRACEBACK
    elif outcome.status == 0:
        name, detail = ACCEPTED, ""
    else:
        name = REFUSED if message and outcome.status in statuses else OTHER_STATUS
        detail = f"status {outcome.status}: {detail}" if name == OTHER_STATUS else detail
    return Verdict(kind, name, attack, detail[-_LONGEST_DETAIL:])


def summarize(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """{kind: {"tried": number, outcome: number, "faults": verdicts that are faults}}."""
    rows: dict[str, Any] = {}
    for verdict in verdicts:
        row = rows.setdefault(verdict.kind, {"tried": 0, **dict.fromkeys(OUTCOMES, 0), "faults": []})
        row["tried"] += 1
        row[verdict.outcome] += 1
        if verdict.outcome in FAULTS:
            row["faults"].append({name: getattr(verdict, name) for name in ("outcome", "attack", "detail")})
    return rows


def to_records(verdicts: Iterable[Verdict]) -> list[dict[str, str]]:
    """Verdicts as JSON keeps them."""
    return [dataclasses.asdict(verdict) for verdict in verdicts]


def from_records(records: Iterable[Mapping[str, str]]) -> list[Verdict]:
    """Verdicts from `to_records`."""
    return [Verdict(**record) for record in records]
