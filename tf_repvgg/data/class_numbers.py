"""Numbers of classes from a file, for networks that know more classes than a dataset has, or in another order."""

import csv
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from tf_repvgg import regular_files
from tf_repvgg.data.image_split import ImageSource

_WORDNET_ID = re.compile(r"n\d{8}(?=\s)")


@dataclasses.dataclass(frozen=True)
class ClassNumbers:
    """The numbers under which a network knows classes.

    Attributes:
      numbers: {name of a class: its number}. Some classes of the network may have no name.
      num_classes: Number of classes of the network.

    Example:
      >>> from tf_repvgg.data import ClassNumbers
      >>> ClassNumbers({"cat": 2, "dog": 0}, num_classes=3).labels
      ('dog', '1', 'cat')
    """

    numbers: Mapping[str, int]
    num_classes: int

    @classmethod
    def read(cls, path: str | Path, num_classes: int) -> "ClassNumbers":
        """Reads a file of class names.

        Args:
          path: A .csv file with the name and the number, from 0, of a class in each line's first two columns, and
            perhaps a header; or any other text file with one name per line, in the order of their numbers. Of a line
            that begins with a WordNet id, as "n01440764 tench, Tinca tinca", the id is the name.
          num_classes: Number of classes of the network.

        Raises:
          OSError: If there is no such file, or it is no regular file; names it.
          ValueError: If the file is empty or no text, names a class twice or gives a number twice, or does not fit the
            number of classes.

        Example:
          >>> import pathlib
          >>> from tf_repvgg.data import ClassNumbers
          >>> length = pathlib.Path("labels.csv").write_text("folder,number\\nn02102040,217\\nn01440764,0\\n")
          >>> ClassNumbers.read("labels.csv", num_classes=1000).numbers["n02102040"]
          217
        """
        path = Path(path)
        try:
            lines = regular_files.read_bytes(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{str(path)!r} is no text file in UTF-8; give class names as text") from None
        if path.suffix.lower() == ".csv":
            entries = _read_rows(path, lines)
        else:
            names = [_read_name(line) for line in lines if line.strip()]
            entries = list(zip(names, range(len(names)), strict=True))
        if not entries:
            raise ValueError(f"{str(path)!r} names no class; write the name of a class into each line")
        _check_entries(path, entries, num_classes)
        if path.suffix.lower() != ".csv" and len(entries) != num_classes:
            raise ValueError(
                f"{str(path)!r} lists {len(entries)} classes, but the model distinguishes {num_classes}; list all, or "
                "give some with their numbers in a .csv file"
            )
        return cls(dict(entries), num_classes)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all classes in the order of their numbers; for a class without a name, its number."""
        names = {number: name for name, number in self.numbers.items()}
        return tuple(names.get(number, str(number)) for number in range(self.num_classes))


def _read_rows(path, lines):
    """[(name, number)] of a table."""
    rows = [(line, row) for line, row in enumerate(csv.reader(lines), start=1) if any(row)]
    entries = []
    for index, (line, row) in enumerate(rows):
        name, number = (*(column.strip() for column in row[:2]), "")[:2]
        if name and number.isdecimal():
            entries.append((name, int(number)))
        elif index or len(row) < 2:  # the first line may be a header
            raise ValueError(
                f"line {line} of {str(path)!r} is {','.join(row)!r}; write the name of a class, a comma, and its number"
            )
    return entries


def _read_name(line):
    line = line.strip()
    return line.split()[0] if _WORDNET_ID.match(line) else line


def _check_entries(path, entries, num_classes):
    numbers: dict[str, int] = {}
    names: dict[int, str] = {}
    for name, number in entries:
        if name in numbers:
            raise ValueError(f"{str(path)!r} names the class {name!r} twice, as {numbers[name]} and {number}")
        if number in names:
            raise ValueError(f"{str(path)!r} gives the number {number} to two classes, {names[number]!r} and {name!r}")
        if number >= num_classes:
            raise ValueError(
                f"{str(path)!r} gives the number {number} to the class {name!r}, but the model distinguishes "
                f"{num_classes} classes, 0 to {num_classes - 1}"
            )
        numbers[name], names[number] = number, name


class NumberedSource:
    """A dataset whose classes have the numbers under which a network knows them.

    Args:
      source: Dataset. It need not have all classes of the network.
      classes: Numbers of the classes.

    Raises:
      ValueError: If the dataset has a class without a number.
    """

    def __init__(self, source: ImageSource, classes: ClassNumbers) -> None:
        if missing := [label for label in source.labels if label not in classes.numbers]:
            examples = ", ".join(map(repr, list(classes.numbers)[:3]))
            raise ValueError(
                f"dataset {source.name!r} has the class {missing[0]!r}, which is not among the {len(classes.numbers)} "
                f"classes of the labels ({examples}, ...); add it there, or remove it from the dataset"
            )
        self._source = source
        self._numbers = tf.constant([classes.numbers[label] for label in source.labels], tf.int64)
        self.name = source.name
        self.labels: Sequence[str] = classes.labels
        self.image_shape = source.image_shape
        self.flips = source.flips
        self.splits = source.splits

    def num_examples(self, split: str) -> int:
        """Number of images in a split, or in a part or sum of splits."""
        return self._source.num_examples(split)

    def list_examples(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """References to images and int64 labels, the network's numbers, in a fixed order or shuffled."""
        examples = self._source.list_examples(split, shuffle_seed)
        return examples.map(lambda reference, label: (reference, tf.gather(self._numbers, label)))

    def read(self, reference: tf.Tensor) -> tf.Tensor:
        """Reads an image file (bytes)."""
        return self._source.read(reference)

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decodes an image file to uint8 [height, width, channels]."""
        return self._source.decode(encoded)
