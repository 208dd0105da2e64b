"""The look that all plots of the package share; matplotlib is part of the `train` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Make a figure, its sides in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, *, box: bool = False) -> None:
    """Write a figure to a file, whole or not at all; `box` keeps the top and right edge of axes, as suits matrices."""
    if not box:
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=120))
