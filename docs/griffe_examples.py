"""Extension of Griffe, which reads the docstrings: "Example:" is a section of examples, as "Examples:" is."""

from typing import Any

import griffe


class RenameExampleSections(griffe.Extension):
    """Renames the sections before docstrings are parsed; Griffe takes only the plural for code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
