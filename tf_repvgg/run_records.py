"""What the descriptions in the folder of a run hold: their schemas."""

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from tf_repvgg import json_records

_Name = Annotated[str, Meta(min_length=1)]
_Side = Annotated[int, Meta(ge=1, le=2**15)]
_Pixel = Annotated[float, Meta(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, Meta(ge=1e-6, le=1e6)]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class PreprocessingRecord(TypedDict):
    """How images are preprocessed, in input.json and in the metadata block of integer files.

    Older versions did not write all keys; see `tf_repvgg.data.Preprocessing.from_metadata`.
    """

    size: NotRequired[tuple[_Side, _Side] | None]
    mean: NotRequired[_Pixel | Annotated[list[_Pixel], Meta(min_length=1, max_length=4)]]
    std: NotRequired[_Deviation | Annotated[list[_Deviation], Meta(min_length=1, max_length=4)]]
    resize_shorter_side: NotRequired[_Side | None]


class InputRecord(PreprocessingRecord):
    """Content of input.json."""

    dataset: _Name
    validation_held_out: NotRequired[bool]
    labels: NotRequired[Annotated[list[str], Meta(min_length=1)]]


class EpochRecord(TypedDict):
    """A line of metrics.jsonl, without the metrics, whose names depend on the run."""

    epoch: _Count
    seconds: _Seconds


class ResultRecord(TypedDict):
    """Content of result.json."""

    split: NotRequired[_Name]
    images: NotRequired[_Count]
    top1_percent: NotRequired[Annotated[float, Meta(ge=0, le=100)]]
    training_seconds: NotRequired[_Seconds]
    machine: NotRequired[dict[str, str | int | None]]


def parse_input(content: bytes, name: str) -> dict[str, Any]:
    """The content of input.json.

    Args:
      content: Content of the file.
      name: Name of the file, for messages.

    Raises:
      ValueError: If the content is damaged; names the key, what was found, and what is expected.

    Example:
      >>> from tf_repvgg import run_records
      >>> run_records.parse_input(b'{"dataset": "digits"}', "input.json")
      {'dataset': 'digits'}
    """
    return _parse(content, InputRecord, name)


def parse_preprocessing(content: bytes, name: str) -> dict[str, Any]:
    """The description of a model's images in the metadata block of an integer file.

    Args:
      content: Content of the block, JSON.
      name: Name of the file, for messages.

    Raises:
      ValueError: If the content is damaged; names the key, what was found, and what is expected.

    Example:
      >>> from tf_repvgg import run_records
      >>> try:
      ...     run_records.parse_preprocessing(b'{"mean": [127, 127], "std": [64, 64, 64]}', "model.tflite")
      ... except ValueError as error:
      ...     print(error)
      model.tflite: mean has 2 values, but std has 3; both need one, or one for each channel
    """
    return _parse(content, PreprocessingRecord, name)


def _parse(content, schema, name):
    record = json_records.parse(content, schema, name)
    counts = [len(value) if isinstance(value := record.get(key), list) else 1 for key in ("mean", "std")]
    if len({*counts, 1}) > 2:
        raise ValueError(
            f"{name}: mean has {counts[0]} values, but std has {counts[1]}; both need one, or one for each channel"
        )
    return record
