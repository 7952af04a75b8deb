"""Prints the flags of a program as JSON: python docs/list_flags.py train/main.py

One program per process: train/main.py and export/main.py define flags of the same names.
"""

import json
import runpy
import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).resolve().parents[1]
_NAME = "program"  # not "__main__", so that the program defines its flags and does not run


def list_flags(program: Path) -> list[dict]:
    """The key flags of a program, in the order of their definitions.

    Args:
      program: Path of a program whose flags absl defines.

    Returns:
      One record for each flag: name, default as text (None where there is none), whether it is required, choices
      (None where the values are not enumerated), help, and the file that defines it, relative to the repository.
    """
    sys.path.insert(0, str(program.parent))
    sys.argv = [str(program)]
    runpy.run_path(str(program), run_name=_NAME)
    records = []
    for flag in flags.FLAGS.get_key_flags_for_module(_NAME):
        module = flags.FLAGS.find_module_defining_flag(flag.name)
        file = program if module == _NAME else Path(sys.modules[module].__file__)
        records.append(
            {
                "name": flag.name,
                "default": None if flag.default is None else flag.default_as_str.strip("'"),
                "is_switch": bool(flag.boolean),
                "is_required": any("must have a value" in validator.message for validator in flag.validators),
                "choices": getattr(flag.parser, "enum_values", None),
                "help": flag.help,
                "file": file.resolve().relative_to(ROOT).as_posix(),
            }
        )
    return records


if __name__ == "__main__":
    print(json.dumps(list_flags(Path(sys.argv[1]))))
