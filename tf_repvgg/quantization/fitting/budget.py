"""Budgets: bytes of the file, bytes of the arena, and time of an inference, as "weights:256kB,arena:64kB,time:5ms"."""

import dataclasses
import re

# {unit in lower case: number of bytes}
_BYTES = {"b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
# {name in the text: (field, units)}
_PARTS: dict[str, tuple[str, dict]] = {
    "weights": ("file_bytes", _BYTES),
    "arena": ("arena_bytes", _BYTES),
    "time": ("time_ms", _MILLISECONDS),
}
_GRAMMAR = "write weights:256kB, and if you like arena:64kB and time:5ms, with commas between them"


@dataclasses.dataclass(frozen=True)
class Budget:
    """The largest cost that a network may have on its target; None for no limit.

    Attributes:
      file_bytes: Bytes of the target's file: weights, tables, biases and graph.
      arena_bytes: Bytes of working memory: the tensor arena of TFLite Micro, the SRAM of an Ethos-U.
      time_ms: Milliseconds of an inference.

    Example:
      >>> from tf_repvgg.quantization.fitting import Budget
      >>> Budget.parse("weights:256kB,time:5ms")
      Budget(file_bytes=256000, arena_bytes=None, time_ms=5.0)
    """

    file_bytes: int | None = None
    arena_bytes: int | None = None
    time_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads a budget.

        Args:
          text: Parts "name:amount" with commas between them. Names are weights, arena and time; amounts have a unit:
            B, kB (1,000 bytes), KiB (1,024), MB, MiB; us, ms, s.

        Raises:
          ValueError: If the text is none; names the part that is wrong.
        """
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, amount = part.strip().partition(":")
            match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", amount)
            if name not in _PARTS or not match:
                raise ValueError(f"the budget {text!r} holds {part!r}; {_GRAMMAR}")
            field, units = _PARTS[name]
            if match[2].lower() not in units:
                raise ValueError(
                    f"the budget {text!r} has the unit {match[2]!r} in {part!r}; known: {', '.join(units)}"
                )
            if field in values:
                raise ValueError(f"the budget {text!r} names {name} twice; leave out one of them")
            values[field] = float(match[1]) * units[match[2].lower()]
            if values[field] <= 0:
                raise ValueError(f"the budget {text!r} holds {part!r}; give an amount above zero")
        sizes = {field: int(values[field]) if field in values else None for field in ("file_bytes", "arena_bytes")}
        return cls(**sizes, time_ms=values.get("time_ms"))

    def limits(self) -> dict[str, float]:
        """{name of a field: limit} of the fields that have one."""
        return {field: limit for field, limit in dataclasses.asdict(self).items() if limit is not None}


class BudgetError(ValueError):
    """No assignment is within the budget.

    Example:
      >>> from tf_repvgg.quantization.fitting import BudgetError
      >>> issubclass(BudgetError, ValueError)
      True
    """
