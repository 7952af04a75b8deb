"""Integer files for each runtime: `TARGETS[name](file)` builds a `Built`.

Each target is one file here with a function `build`; this table is the only place that knows them all.
"""

import functools
from collections.abc import Callable, Iterable

from tf_repvgg.tflite.targets import edge_tpu, ethos_u, litert_int4, litert_int8, tflm_lut
from tf_repvgg.tflite.targets.base import Built, optional_module

__all__ = ["TARGETS", "Built", "check_installed", "parse"]

TARGETS: dict[str, Callable[[bytes], Built]] = {
    "litert_int8": litert_int8.build,
    "litert_int4": litert_int4.build,
    "tflm_lut": tflm_lut.build,
    "edge_tpu": edge_tpu.build,
} | {name.replace("-", "_"): functools.partial(ethos_u.build, accelerator=name) for name in ethos_u.ACCELERATORS}

# {target: (module, package)} of the targets that need a package of the optional extra.
_NEEDED_PACKAGES = {name: (ethos_u.MODULE, ethos_u.PACKAGE) for name in TARGETS if name.startswith("ethos_u")} | {
    "tflm_lut": (tflm_lut.MODULE, tflm_lut.PACKAGE)
}


def parse(names: Iterable[str]) -> list[str]:
    """Checks names of targets, and drops repeated ones.

    Args:
      names: Names of targets.

    Returns:
      The names in order.

    Raises:
      ValueError: If a name is not in `TARGETS`, or there is none.

    Example:
      >>> from tf_repvgg.tflite import targets
      >>> targets.parse(["litert_int8", "edge_tpu", "litert_int8"])
      ['litert_int8', 'edge_tpu']
    """
    names = list(names)
    if not names:
        raise ValueError(f"no target is named; known: {', '.join(TARGETS)}")
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"target is {name!r}; known: {', '.join(TARGETS)}")
    return list(dict.fromkeys(names))


def check_installed(names: Iterable[str]) -> None:
    """Imports the packages that targets need beyond those of this package, before anything is computed.

    Args:
      names: Names of targets.

    Raises:
      ValueError: If a package is not installed; the message says how to install it.

    Example:
      >>> from tf_repvgg.tflite import targets
      >>> targets.check_installed(["litert_int8", "edge_tpu"])  # need no further package
    """
    for name in names:
        if name in _NEEDED_PACKAGES:
            optional_module(*_NEEDED_PACKAGES[name])
