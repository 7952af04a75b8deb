"""Values by layer name: "stem=8,stage4_.*=4,.*=2", regular expressions of whole names, the first match wins."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def parse(value: Any, parse_value: Callable[[Any], Value], description: str) -> dict[str, Value]:
    """Reads one value for all layers, or values by pattern.

    Args:
      value: A single value; a mapping {pattern: value}; or text, either a single value or "pattern=value,...". A part
        of the text without "=" is the value of all layers that no earlier pattern matches.
      parse_value: Function that converts a value, from text or not; raises ValueError for a bad one.
      description: Name of the values in messages, such as "weight bits".

    Returns:
      {pattern: value} in the order given.

    Raises:
      ValueError: If a pattern is not a regular expression or appears twice, or `parse_value` refuses a value.

    Example:
      >>> from tf_repvgg import by_name
      >>> by_name.parse("stem=8,.*=4", int, "weight bits")
      {'stem': 8, '.*': 4}
    """
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str):
        pairs = [part.rpartition("=")[::2] if "=" in part else (".*", part) for part in value.split(",")]
    else:
        pairs = [(".*", value)]
    values: dict[str, Value] = {}
    for pattern, item in pairs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{description} for pattern {pattern!r}: not a regular expression ({error})") from None
        if pattern in values:
            raise ValueError(f"pattern {pattern!r} of {description} appears twice; remove one of them")
        values[pattern] = parse_value(item)
    return values


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches a whole name; None if there is none.

    Example:
      >>> from tf_repvgg import by_name
      >>> by_name.first_match("stage4_block1", ["stem", "stage4_.*", ".*"])
      'stage4_.*'
    """
    return next((pattern for pattern in patterns if re.fullmatch(pattern, name)), None)


def resolve(values: Mapping[str, Value], names: Iterable[str], description: str) -> dict[str, Value]:
    """Finds the value of each layer.

    Args:
      values: {pattern: value}, see `parse`.
      names: Names of all layers that need a value.
      description: Name of the values in messages.

    Returns:
      {name: value}.

    Raises:
      ValueError: If a pattern matches no layer or only layers that an earlier pattern matches, or no pattern matches a
        layer. Names the pattern or the layer.

    Example:
      >>> from tf_repvgg import by_name
      >>> by_name.resolve({"stem": 8, ".*": 4}, ["stem", "logits"], "weight bits")
      {'stem': 8, 'logits': 4}
    """
    names = list(names)
    for pattern in values:
        if not any(re.fullmatch(pattern, name) for name in names):
            similar = difflib.get_close_matches(pattern, names) or names
            raise ValueError(f"pattern {pattern!r} of {description} matches no layer; there are: {', '.join(similar)}")
    matches = {name: first_match(name, values) for name in names}
    if missing := [name for name, pattern in matches.items() if pattern is None]:
        raise ValueError(f"no pattern of {description} matches layer {missing[0]!r}; add '.*' as the last one")
    if unused := [pattern for pattern in values if pattern not in matches.values()]:
        raise ValueError(
            f"pattern {unused[0]!r} of {description} comes too late: earlier patterns match every layer that it "
            "matches; put it first"
        )
    return {name: values[pattern] for name, pattern in matches.items() if pattern is not None}
