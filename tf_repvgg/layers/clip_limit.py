"""How OABN's limit k is written: a number, a multiple of the kernel's standard deviation, or either by layer name."""

import dataclasses
import math
from collections.abc import Mapping

from tf_repvgg import by_name

_FORM = "a number above 0, 'inf', or a multiple of the kernel's standard deviation such as '6std'"


@dataclasses.dataclass(frozen=True)
class ClipLimit:
    """The largest allowed |gamma| / sqrt(variance + epsilon) of a batch normalization.

    Attributes:
      value: Limit, above 0; infinity switches clipping off.
      relative: Whether `value` counts standard deviations of the block's merged kernel without its identity branch, so
        that the limit shrinks with the other weights; otherwise `value` is the limit itself.

    Example:
      >>> from tf_repvgg.layers import ClipLimit
      >>> ClipLimit.parse("6std")
      ClipLimit(value=6.0, relative=True)
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, k: float | str) -> "ClipLimit":
        """Reads 0.1, "0.1", "inf" or "6std".

        Raises:
          ValueError: If `k` is none of these or not above 0.
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


def parse_clip_limits(k: float | str | Mapping[str, float | str]) -> dict[str, float | str]:
    """Reads k of all layers, or by layer name: "stage4_.*=0.05,.*=0.1".

    Args:
      k: A limit as `ClipLimit.parse` reads it; a mapping {pattern of layer names: limit}; or text of either.

    Returns:
      {pattern: limit as it was written}, see `tf_repvgg.by_name.parse`.

    Raises:
      ValueError: As `tf_repvgg.by_name.parse`, and for a limit that `ClipLimit.parse` refuses.
    """

    def check_limit(limit):
        ClipLimit.parse(limit)
        return limit

    return by_name.parse(k, check_limit, "k")
