"""Tables and pages in Markdown, and how an experiment writes them beside its JSON."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from tf_repvgg import storage
from tf_repvgg.quantization.uniform import GRANULARITIES

# Every page with numbers from CIFAR-10 ends its introduction with this.
IMAGES = "Images: CIFAR-10; the committed numbers are from a copy that is re-encoded as JPEG (quality 75)."
_PAGE_WIDTH = 120


def make_table(rows: Iterable[Sequence], headers: Sequence[str], tablefmt: str = "github") -> str:
    """A table whose cells are printed as they are."""
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def make_paragraph(text: str) -> str:
    """A text of any line breaks, wrapped to the width of a page."""
    return _fill(text)


def wrap_page(page: str) -> str:
    """Wraps the paragraphs and list items of a page; headings, tables, pictures and indented code stay as they are."""
    return "\n\n".join(_wrap_block(block) for block in page.split("\n\n"))


def make_bits_table(exports: Mapping[str, dict], bits: Iterable[int], tablefmt: str = "github") -> str:
    """One row per model: float top-1, then integer top-1 per weight width, "per tensor / per channel", in percent.

    Args:
      exports: Contents of export.json by title of the model.
      bits: Weight widths, one column each.
      tablefmt: Format of tabulate.
    """
    rows = []
    for name, export in exports.items():
        top1 = {(file["weight_bits"], file["granularity"]): file["top1_percent"] for file in export["files"]}
        cells = [" / ".join(f"{top1[width, granularity]:.1f}" for granularity in GRANULARITIES) for width in bits]
        rows.append([name, f"{export['float_fused_top1_percent']:.1f}", *cells])
    return make_table(rows, ["model", "FP32", *(f"{width} bit" for width in bits)], tablefmt)


def write_results(folder: Path, name: str, record: dict, page: str) -> None:
    """Writes <folder>/<name>.json and, beside it, the page to read."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / f"{name}.json", record)
    write_page(folder / f"{name}.md", page)


def write_page(path: Path, page: str) -> None:
    """Writes a page so that it is whole or absent, and ends with one newline."""
    storage.write_bytes(path, f"{page.rstrip()}\n".encode())


def _wrap_block(block):
    if block.startswith(("#", "|", "![", "    ")):
        return block
    items = re.split(r"\n(?=- )", block)
    return "\n".join(_fill(item, "  " if item.startswith("- ") else "") for item in items)


def _fill(text, indent=""):
    options = {"break_on_hyphens": False, "break_long_words": False, "subsequent_indent": indent}
    return textwrap.fill(" ".join(text.split()), _PAGE_WIDTH, **options)
