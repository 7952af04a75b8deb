"""What an integer file becomes for each runtime: `TARGETS[name](file)`, a `Built`.

One target is one file here with a function `build`; this table is the only place that knows them all.
"""

import functools

from tf_repvgg.tflite.targets import edge_tpu, ethos_u, litert_int4, litert_int8, tflm_lut
from tf_repvgg.tflite.targets.base import Built, optional_module

__all__ = ["TARGETS", "Built", "check_installed", "parse"]

TARGETS = {
    "litert_int8": litert_int8.build,
    "litert_int4": litert_int4.build,
    "tflm_lut": tflm_lut.build,
    "edge_tpu": edge_tpu.build,
} | {name.replace("-", "_"): functools.partial(ethos_u.build, accelerator=name) for name in ethos_u.ACCELERATORS}

# Targets by the file here that tells the package of the optional extra that they need.
NEEDED = {name: ethos_u for name in TARGETS if name.startswith("ethos_u")} | {"tflm_lut": tflm_lut}


def parse(names) -> list[str]:
    """Names of targets, each once, in order.

    Raises:
      ValueError: for one that is not in `TARGETS`.
    """
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"target is {name!r}; known: {', '.join(TARGETS)}")
    return list(dict.fromkeys(names))


def check_installed(names):
    """Imports what targets need beyond this package, before anything is computed for them.

    Raises:
      ValueError: if a package is not installed; tells how to install it.
    """
    for name in names:
        if name in NEEDED:
            optional_module(NEEDED[name].MODULE, NEEDED[name].PACKAGE)
