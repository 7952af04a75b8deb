"""Mutations of files and of flags' values, drawn from a seed."""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_LONG = "long" * 5000

# Values of other types, out of range, or with a meaning to some reader; {run} and so on are in the sandbox.
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, -(10**30)),
    *(2**31, 2**32, 2**53 + 1, 2**63, 2**64, 1e-300, 10**400),
    *("", "x", "0", "-1", "nan", "../../x", "\0", "\ud800", "é" * 1000, _LONG, "%s", "{0}", "\n\n"),
    *([], {}, [[]], [[[[1]]]], {"": ""}, [None], ["x"], [1, "x", None], {"x": {"x": {}}}),
)
FLAG_VALUES = (
    *("", " ", "0", "1", "-1", "-0", "2", "3", "7", "0.5", "-0.5", "1e-30", "1e30", "1e39", "1e308", "nan", "inf"),
    *("-inf", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1" * 400),
    *("x", "X", "None", "null", "true", "false", "=", "==", "a=b", "a=", "=8", ".*=8", ".*=x", "stem=8,stem=4"),
    *("stem=8,", ",", ",,", "1,2", "8,8", "8,x", "per_tensor,per_tensor", "[", "(", "*", "[0-9]+=8", "(?P<x>=8"),
    *("'", '"', "\\", "\t", "\n", "é", "\u202e", "%s", "{}", "{x}", "$HOME", "~", "~nobody", "-x", "--x", "a b"),
    *("min_max+min_max", "equalize+", "+", "adaquant+equalize", "digitz", "folder:", "folder:x", "folder:{empty}"),
    *("{empty}", "{missing}", "{file}", "{file}/x", "{run}", "{run}/model.keras", "{run}/input.json", "{pipe}"),
    *("min_max", "mse", "equalize+adaquant", "digits", "digits,digits", "0.25", "16", "64", "100", "1000000"),
    *("{loop}", "{folder_of_pipe}", "/dev/null", "/dev/zero", "folder:/dev", "{file}:{file}", "." * 300, _LONG),
)
_NUMBERS = ("0", "1", "2", "3", "5", "8", "9", "16", "31", "100", "256", "360", "1437", "2000", "100000", "1e-9", "0.5")


def draw_flag_value(choices: Sequence[str], is_number: bool, random: np.random.Generator) -> str:
    """A value for a flag, in half of all cases one that its type allows.

    Args:
      choices: Values that the flag may have; empty if they are not a few.
      is_number: Whether the flag is a number.
      random: Source of the value.
    """
    allowed = choices or (_NUMBERS if is_number else ())
    return str(_pick(allowed if allowed and random.random() < 0.5 else FLAG_VALUES, random))


def mutate_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Changes bytes: some of them, their number, or their order."""
    array = bytearray(content)
    start, stop = sorted(int(position) for position in random.integers(0, len(array) + 1, 2))
    stop = min(stop, start + int(random.choice([1, 4, 64, 4096, len(array) + 1])))
    kind = int(random.integers(9))
    if kind < 3 and array:
        for position in random.integers(0, len(array), int(random.choice([1, 2, 8, 100]))):
            array[position] ^= 1 << int(random.integers(8))
        return bytes(array)
    if kind == 3:
        return bytes(array[:start])
    if kind == 4:
        return bytes(array[:start] + array[stop:])
    if kind == 5:
        return bytes(array[:stop] + array[start:])
    if kind == 6:
        return bytes(array[:start] + random.bytes(int(random.integers(1, 300))) + array[start:])
    if kind == 7:
        filler = bytes([int(random.choice([0, 255, ord("9"), ord("[")]))])
        return bytes(array[:start] + filler * (stop - start) + array[stop:])
    return bytes(random.choice([b"", b"\0" * 100, b"\xff\xfe", random.bytes(1000), b"PK\x03\x04", b"{", b"[" * 10**5]))


def mutate_json(content: bytes, random: np.random.Generator) -> bytes:
    """Changes a value or a key of JSON, or its bytes."""
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    record = json.loads(content)
    places: list[tuple[Any, Any]] = []
    _list_places(record, places)
    if not places or random.random() < 0.05:
        return json.dumps(_pick(JSON_VALUES, random)).encode()
    container, key = places[int(random.integers(len(places)))]
    kind = int(random.integers(10))
    if kind < 7:
        container[key] = _pick(JSON_VALUES, random)
    elif kind == 7:
        del container[key]
    elif kind == 8:
        nested = container[key]
        for _ in range(int(random.choice([1, 50, 900]))):
            nested = [nested]
        container[key] = nested
    elif isinstance(container, dict):
        container[str(_pick(FLAG_VALUES, random))] = container.pop(key)
    else:
        container.extend(container * 3)
    return json.dumps(record).encode()


def mutate_lines(content: bytes, random: np.random.Generator) -> bytes:
    """Changes a line: leaves it out, repeats it, or mutates it as JSON or as bytes."""
    lines = content.splitlines(keepends=True)
    if not lines or random.random() < 0.2:
        return mutate_bytes(content, random)
    index = int(random.integers(len(lines)))
    kind = int(random.integers(6))
    if kind == 0:
        del lines[index]
    elif kind == 1:
        lines.insert(int(random.integers(len(lines))), lines[index])
    elif kind == 2:
        lines.insert(index, str(_pick(FLAG_VALUES, random)).encode(errors="replace") + b"\n")
    elif lines[index].startswith(b"{"):
        lines[index] = mutate_json(lines[index], random) + b"\n"
    elif kind == 3 and b"=" in lines[index]:
        name = lines[index].partition(b"=")[0]
        lines[index] = name + b"=" + str(_pick(FLAG_VALUES, random)).encode(errors="replace") + b"\n"
    else:
        lines[index] = mutate_bytes(lines[index], random)
    return b"".join(lines)


def mutate_zip(content: bytes, random: np.random.Generator) -> bytes:
    """Changes a member of a zip file, renames it, or leaves it out; or changes the bytes of the archive."""
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = _pick(sorted(members), random)
    kind = int(random.integers(8))
    member = members.pop(name)
    if kind == 1:
        members[f"../{name}"] = member
    elif kind == 2:
        members[name.upper()] = member
    elif kind > 2:
        members[name] = (mutate_json if name.endswith(".json") else mutate_bytes)(member, random)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return stream.getvalue()


def choose_mutator(name: str) -> Callable[[bytes, np.random.Generator], bytes]:
    """The mutator for files of a name."""
    if name.endswith(".json"):
        return mutate_json
    if name.endswith((".keras", ".npz", ".pth")):
        return mutate_zip
    return mutate_lines if name.endswith((".jsonl", ".flags", ".csv", ".txt")) else mutate_bytes


def _pick(values, random):
    return values[int(random.integers(len(values)))]


def _list_places(value, places):
    """All (container, key) within a value of JSON."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        places.append((value, key))
        _list_places(value[key], places)
