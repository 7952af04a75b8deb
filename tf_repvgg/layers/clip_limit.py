"""How OABN's limit k is written down: a number, a multiple of the kernel's spread, or either by layer name."""

import dataclasses
import math
import re
from collections.abc import Mapping

_FORM = "a number above 0, 'inf', or a multiple of the kernel's standard deviation such as '6std'"


@dataclasses.dataclass(frozen=True)
class ClipLimit:
    """The largest allowed |gamma| / sqrt(variance + epsilon) of a batch normalization.

    Attributes:
      value: the limit, above 0; infinity switches clipping off.
      relative: if True, `value` counts standard deviations of the block's merged kernel without its identity
        branch, so that the limit shrinks with the other weights; if False, `value` is the limit itself.
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, k) -> "ClipLimit":
        """Reads 0.1, "0.1", "inf" or "6std".

        Raises:
          ValueError: if `k` is none of these or not above 0.
        """
        text = str(k).strip()
        relative = text.endswith("std")
        try:
            value = float(text.removesuffix("std"))
        except ValueError:
            value = math.nan
        if not value > 0:
            raise ValueError(f"k is {k!r}; it must be {_FORM}")
        return cls(value, relative)


def parse_by_name(text: str) -> str | dict[str, str]:
    """Reads the flag form of k: "0.1", or "stage4_.*=0.05,.*=0.1" as {pattern: k} in the order given.

    Raises:
      ValueError: if a pattern is not a regular expression or a limit is not one `ClipLimit.parse` accepts.
    """
    if "=" not in text:
        ClipLimit.parse(text)
        return text
    limits = dict(part.rsplit("=", 1) if "=" in part else (part, "") for part in text.split(","))
    for pattern, k in limits.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"k for pattern {pattern!r}: not a regular expression ({error})") from None
        ClipLimit.parse(k)
    return limits


def limit_for(name: str, k: float | str | Mapping[str, float | str]) -> float | str:
    """The limit of the layer called `name`: `k` itself, or that of the first pattern matching the whole name.

    Raises:
      ValueError: if `k` is a mapping and no pattern matches.
    """
    if not isinstance(k, Mapping):
        return k
    for pattern, limit in k.items():
        if re.fullmatch(pattern, name):
            return limit
    raise ValueError(f"no pattern of k matches block {name!r}; patterns: {', '.join(k)}; add '.*' as the last one")
