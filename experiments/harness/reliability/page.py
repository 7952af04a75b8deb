"""The page of experiments/reliability.py."""

from collections.abc import Mapping
from typing import Any

from harness.reliability.verdicts import ACCEPTED, FAULTS, OUTCOMES, REFUSED
from harness.tables import make_paragraph, make_table

PARTS = {
    "kills": "SIGKILL at random moments, some in a row, and the same command until it is done. Accepted: it then held "
    "what an uninterrupted run holds, bit for bit.",
    "signals": "SIGINT and SIGTERM at random moments, a part of them while a process of its own imports. Refused in "
    "one line: the program ended with its line and status 130 or 143; accepted: it was done before.",
    "write_points": "Every write that a short run makes to its folder: from there on the disk is full, or the "
    "process is killed there. The same command completes afterwards, bit for bit, or data count as lost.",
    "disks": "Disks of a few sizes, which also refuse what TensorFlow's native code writes.",
    "at_once": "Two and three processes at once with one folder. Refused: the folder is in use.",
    "crafted": "Model files that try to run code, to read or write other files, to fill memory, or to hang.",
    "mutations": "Files and flags' values, mutated from a seed: read by the library's readers (file), or given to the "
    "programs (program, flags). Accepted: it still was what a reader can take.",
}


def render(record: Mapping[str, Any]) -> str:
    """The page in Markdown, from the content of reliability.json, which may lack parts."""
    totals = count_outcomes(record)
    faults = sum(totals[name] for name in FAULTS)
    sources = {content["sources_sha256"] for content in record["parts"].values()}
    versions = "Parts are of different versions of the sources." if len(sources) > 1 else ""
    text = [
        "# Reliability",
        make_paragraph(
            f"""`python experiments/reliability.py`, part by part (--parts): {totals["tried"]:,} attacks on the programs
            and the readers of files, {faults} of which ended as none may. Refused in one line: exit status 2 and a line
            that names what is wrong (status 1 for full disks, 130 and 143 for signals). "Bit for bit" leaves out times,
            and curves in reports, which depend on times. {versions}"""
        ),
        make_total_table(record),
    ]
    for part, description in PARTS.items():
        if part not in record["parts"]:
            text += [f"## {name_part(part)}", "Not measured yet."]
            continue
        content = record["parts"][part]
        end = "" if content["is_complete"] else " The limit of time ended this part before its number was reached."
        text += [f"## {name_part(part)}", make_paragraph(description + end), make_part_table(content["rows"])]
    if lines := list_faults(record):
        text += ["## Faults", "\n".join(make_paragraph(f"- {line}") for line in lines)]
    return "\n\n".join(text)


def name_part(part: str) -> str:
    """Title of a part."""
    return part.replace("_", " ").capitalize()


def make_total_table(record: Mapping[str, Any]) -> str:
    """One row per part, and one for all."""
    counts = {name_part(part): _add(content["rows"].values()) for part, content in record["parts"].items()}
    return make_part_table(counts | {"all": count_outcomes(record)})


def make_part_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per kind of attack."""
    cells = [[kind, row["tried"], *(row[name] for name in OUTCOMES)] for kind, row in sorted(rows.items())]
    return make_table(cells, ["", "tried", *OUTCOMES])


def count_outcomes(record: Mapping[str, Any]) -> dict[str, int]:
    """{"tried" or outcome: number} over all parts."""
    return _add(row for content in record["parts"].values() for row in content["rows"].values())


def list_faults(record: Mapping[str, Any]) -> list[str]:
    """Every fault in a line."""
    return [
        f"{kind}, {fault['attack']}: {fault['outcome']}: {' '.join(fault['detail'].split())}"
        for content in record["parts"].values()
        for kind, row in content["rows"].items()
        for fault in row["faults"]
    ]


def _add(rows):
    rows = list(rows)
    return {name: sum(row[name] for row in rows) for name in ("tried", REFUSED, ACCEPTED, *FAULTS)}
