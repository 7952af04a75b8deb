"""Figures as inline SVG by Matplotlib, in which text stays text and takes the page's colour, light or dark."""

import functools
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import markupsafe
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Figures are drawn in this colour, which the colour of the page then replaces.
INK = "#010203"
COLOURS = ("#3b82c4", "#d9544d", "#3f9b62", "#c9892b", "#8d68c4", "#2ba3a3")
MARKERS = "osD^vP"
# In inches; narrow enough to be legible when a phone shows the figure in full.
_WIDTH = 4.6
_STYLE: Any = {  # too many keys for a type
    "svg.fonttype": "none",
    "svg.hashsalt": "tf_repvgg",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}

_numbers = itertools.count()


def return_svg(draw: Callable[..., str]) -> Callable[..., str]:
    """Turns a function that draws on axes and returns a description into one that returns SVG.

    Args:
      draw: Function from axes and other arguments to a description of the figure, for those who cannot see it.

    Returns:
      Function from the other arguments, and `height` in inches, to SVG.
    """

    @functools.wraps(draw)
    def wrapper(*arguments, height=3.1):
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            description = draw(figure.subplots(), *arguments)
            return _to_svg(figure, description)

    return wrapper


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Puts a legend below the axes."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _to_svg(figure, description):
    content, prefix = io.StringIO(), f"figure{next(_numbers)}-"
    figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers are unique within a figure, but several figures share a page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = markupsafe.escape(description)
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
