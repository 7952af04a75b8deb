"""JSON from files, checked against a schema before anything uses it. msgspec does the checking."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tf_repvgg import regular_files

_LONGEST_VALUE = 60
_SEAL = "record_sha256"


def read(path: str | Path, schema: Any) -> Any:
    """Reads a JSON file.

    Args:
      path: File to read.
      schema: Type of the content, such as a `TypedDict`, as msgspec understands it. Keys beside its own are allowed.

    Returns:
      The content, with all its keys.

    Raises:
      OSError: If the file is missing, cannot be read, or is not a regular file; names it.
      ValueError: If it is not JSON, or not as the schema says; names the file and the key, and says what was found and
        what is expected.

    Example:
      >>> import pathlib, tempfile
      >>> from tf_repvgg import json_records
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "result.json")
      ...     length = path.write_text('{"images": 360, "split": "test"}')
      ...     json_records.read(path, dict[str, int | str])
      {'images': 360, 'split': 'test'}
    """
    return parse(regular_files.read_bytes(path), schema, str(path))


def parse(content: bytes | str, schema: Any, name: str) -> Any:
    """Reads JSON.

    Args:
      content: JSON, in UTF-8 if it is bytes.
      schema: Type of the content; see `read`.
      name: Name of the file, or of the part of it, for messages.

    Returns:
      The content, with all its keys.

    Raises:
      ValueError: If it is not JSON, or not as the schema says; see `read`.

    Example:
      >>> from typing import TypedDict
      >>> from tf_repvgg import json_records
      >>> class Result(TypedDict):
      ...     images: int
      >>> try:
      ...     json_records.parse('{"images": "many"}', Result, "result.json")
      ... except ValueError as error:
      ...     print(error)
      result.json: images is 'many', but `int` is expected
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: it is not JSON in UTF-8 ({error})") from None
    check(record, schema, name)
    return record


def check(record: Any, schema: Any, name: str) -> None:
    """Checks what JSON has held; see `read`.

    Raises:
      ValueError: If the record is not as the schema says.
    """
    try:
        msgspec.convert(record, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{name}: {_explain(str(error), record)}") from None


def _explain(message, record):
    """The message of msgspec, such as "Expected `int` >= 1 - at `$.size[0]`", with the value that was found."""
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return f"{'.'.join(filter(None, [path, missing[1]]))} is missing"
    expected, _, actual = reason.removeprefix("Expected ").partition(", got ")
    value = _look_up(record, path)
    if value is None and actual != "`null`":  # the path is not that of one value: `$[...]`
        return f"{path or 'its content'}: {expected} is expected, but {actual or 'something else'} was found"
    text = repr(value)
    text = text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
    return f"{path or 'its content'} is {text}, but {expected} is expected"


def _look_up(record, path):
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            record = record[int(index)] if index else record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a checksum of its content, so that a changed byte is noticed.

    Example:
      >>> from tf_repvgg import json_records
      >>> sealed = json_records.seal({"epoch": 3})
      >>> json_records.is_whole(sealed), json_records.is_whole(sealed | {"epoch": 2})
      (True, False)
    """
    return {**record, _SEAL: _hash(record)}


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record that `seal` has made is unchanged."""
    return record.get(_SEAL) == _hash(unseal(record))


def unseal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its checksum."""
    return {key: value for key, value in record.items() if key != _SEAL}


def _hash(record):
    as_read = json.loads(json.dumps(record))  # there tuples are lists, and all keys are text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
