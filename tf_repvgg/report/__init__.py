"""What was trained and exported, as one page to look at: `write(path, [gather(...), ...])`.

`gather` reads what train/main.py and export/main.py left and knows no page; `figures` draws; `page.html` lays out.
"""

import importlib.util
from collections.abc import Sequence

from tf_repvgg import storage
from tf_repvgg.report.gather import Run, gather

__all__ = ["Run", "check_installed", "gather", "write"]

_NEEDED = ("matplotlib", "jinja2")


def check_installed():
    """Looks for the packages that draw and lay out, which the package itself does without.

    Raises:
      ValueError: if one is missing; tells how to install it.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"a report needs {missing[0]}; install it with: pip install 'tf_repvgg[figures]'")


def write(path, gathered: Sequence[Run]) -> None:
    """Writes one self-contained HTML page about one run, or several side by side.

    Raises:
      ValueError: as `check_installed`.
      OSError: if it cannot be written.
    """
    check_installed()
    from tf_repvgg.report import page  # imports them

    storage.write_bytes(path, page.render(gathered).encode())
