"""Accuracy tables out of what export/main.py measured."""

from pathlib import Path

from tabulate import tabulate

from tf_repvgg import storage
from tf_repvgg.quantization.uniform import GRANULARITIES


def bits_table(exports: dict[str, dict], bits, tablefmt="github") -> str:
    """One row per model: float top-1, then integer top-1 per weight width, "per tensor / per channel", in percent."""
    rows = []
    for name, report in exports.items():
        top1 = {(entry["weight_bits"], entry["granularity"]): entry["top1_percent"] for entry in report["files"]}
        cells = [" / ".join(f"{top1[width, granularity]:.1f}" for granularity in GRANULARITIES) for width in bits]
        rows.append([name, f"{report['float_fused_top1_percent']:.1f}", *cells])
    headers = ["model", "FP32", *(f"{width} bit" for width in bits)]
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def write_results(folder: Path, name: str, record: dict, page: str) -> None:
    """Leaves results/<name>.json and the readable page beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / f"{name}.json", record)
    storage.write_bytes(folder / f"{name}.md", f"{page.rstrip()}\n".encode())
