"""What the figures of the documentation share: colours, and how they are saved."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
BLUE, RED, GREEN, GREY = "#3b6ea5", "#cf4155", "#3d8f5f", "#8a8a8a"

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",  # readable on the dark page too
        "svg.hashsalt": "tf_repvgg",  # the same picture gives the same file
    }
)


def save(figure: plt.Figure, name: str) -> None:
    """Writes a figure to docs/images.

    Args:
      figure: Figure to write; closed afterwards.
      name: File name, ending in ".svg" or ".png".
    """
    metadata = {"Date": None} if name.endswith(".svg") else {}
    figure.savefig(IMAGES / name, dpi=110, metadata=metadata)
    plt.close(figure)
    print(f"docs/images/{name}")
