"""`Report`: the figures of an evaluation, whatever the task, and what the reports of all tasks share."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevit.files import write_text
from mobilevit.plotting import new_figure, save_figure


class Report(Protocol):
    """How a model fared on images whose truth is known."""

    @property
    def num_images(self) -> int:
        """Images it was computed from."""

    @property
    def score_name(self) -> str:
        """Name of `score`: "top1", "ap" or "miou"."""

    @property
    def score(self) -> float:
        """The figure that decides which weights are best; higher is better."""

    @property
    def score_threshold(self) -> float | None:
        """The lowest score of detections to show; None where there are none."""

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name, rounded to six places."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

    def headline(self) -> list[tuple[str, str]]:
        """Return the main figures, as pairs of name and text."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the table of classes, as text."""

    def save_plots(self, folder: Path) -> None:
        """Write images and tables into a folder, each whole or not at all."""


def save_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def save_confusion_matrix(
    confusion: NDArray[np.int64],
    names: Sequence[str],
    folder: Path,
    *,
    title: str,
    as_shares: bool = False,
    most_classes: int = 60,
) -> None:
    """Write `confusion_matrix.csv`, and `confusion_matrix.png` unless there are too many classes to be legible.

    Args:
        confusion: counts, (K, K); rows are the true classes, columns the predicted ones.
        names: of the classes.
        folder: where to.
        title: stands above the image.
        as_shares: write the share of the row into each square instead of the count, which is long for pixels.
        most_classes: no image of more.
    """
    rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
    save_csv(folder / "confusion_matrix.csv", [["true \\ predicted", *names], *rows])
    if len(names) > most_classes:
        return
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.2 + 0.5 * len(names)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks, shown = range(len(names)), [plot_text(name) for name in names]
    axes.set_xticks(ticks, shown, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(ticks, shown, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for (row, column), count in np.ndenumerate(confusion):
        share = shares[row, column]
        text = f"{share:.0%}" if as_shares else f"{count:,}"
        if count and text != "0%":
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    save_figure(figure, folder / "confusion_matrix.png", box=True)


def plot_text(name: str, longest: int = 40) -> str:
    """A class name as matplotlib can write it, for a folder's need not be UTF-8; those with $ need parse_math=False."""
    text = name.encode(errors="replace").decode()
    return text if len(text) <= longest else text[: longest - 3] + "..."


def as_text(value: float | None, form: str = ".3f") -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if value is None else format(value, form)


def rounded(value: Any) -> Any:
    """A figure for JSON: floats to six places, the rest as it is."""
    return round(value, 6) if isinstance(value, float) else value
