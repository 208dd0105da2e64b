"""`Meter` gathers what an evaluation sees, image by image; `Report` has the figures computed from it."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.files import Json, write_text
from mobilevit.imaging.preprocessing import Placement
from mobilevit.plotting import new_figure, save_figure
from mobilevit.results.base import Outputs

Truth = TypeVar("Truth")
"""Ground truth that predictions for an image are compared with."""

MOST_IN_MATRIX = 60
"""Confusion matrices of more classes would not be legible."""


def shown(title: str, form: str = "") -> dict[str, str]:
    """Make the metadata of a field that people read: its title and format."""
    return {"title": title, "form": form}


@dataclass(frozen=True, kw_only=True)
class _Figures:
    def texts(self) -> dict[str, str]:
        """The figures that people read as text, by title; a dash where there is none."""
        texts = {}
        for figure in fields(self):
            if figure.metadata:
                value = getattr(self, figure.name)
                texts[figure.metadata["title"]] = "-" if value is None else format(value, figure.metadata["form"])
        return texts


@dataclass(frozen=True, kw_only=True)
class ClassScores(_Figures):
    """The figures of one class."""

    name: str = field(metadata=shown("class"))


@dataclass(frozen=True, kw_only=True)
class Report(_Figures, ABC):
    """The figures of a model on labeled images."""

    num_images: int
    """Images it was computed from."""
    per_class: tuple[ClassScores, ...]

    score_name: ClassVar[str]
    """The figure that decides which weights are best; higher is better."""
    summarized: ClassVar[tuple[str, ...]]
    """Names of the figures in `summary`."""

    @property
    def score(self) -> float:
        """The figure named `score_name`."""
        return float(getattr(self, self.score_name))

    @property
    def min_score(self) -> float | None:
        """The lowest score of detections to show; None where there are none."""
        return None

    @property
    def summary(self) -> dict[str, float]:
        """The figures worth a line, by name, rounded to six places; without those that are None."""
        figures = {name: getattr(self, name) for name in self.summarized}
        return {name: round(value, 6) for name, value in figures.items() if value is not None}

    def to_dict(self) -> Json:
        """Plain values for JSON, single figures first; floats have six decimals."""
        ordered = sorted(vars(self).items(), key=lambda item: isinstance(item[1], tuple | np.ndarray))
        return {name: _plain(value) for name, value in ordered}

    def headline(self) -> list[tuple[str, str]]:
        """Return the main figures, as pairs of title and text."""
        return [(title, text) for title, text in self.texts().items() if text != "-"]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows of the table of classes, as text."""
        rows = [scores.texts() for scores in self.per_class]
        return list(rows[0]), [list(row.values()) for row in rows]

    @abstractmethod
    def save_plots(self, folder: Path) -> None:
        """Write images and tables into a folder, each whole or not at all."""

    def save_table(self, path: Path) -> None:
        """Write the table of classes as CSV, with all digits."""
        names = [figure.name for figure in fields(self.per_class[0]) if figure.metadata]
        save_csv(path, [names, *([getattr(scores, name) for name in names] for scores in self.per_class)])


class Meter(ABC, Generic[Truth]):
    """Gathers what a report is computed from; it can be pickled to another process.

    Neither the order of the images nor their division over processes changes the report.
    """

    images: Mapping[int, object]
    """Records of the images seen, by their numbers in the data."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.images = {}

    @property
    def indices(self) -> list[int]:
        """The images seen, ascending."""
        return sorted(self.images)

    def merge(self, other: Self) -> None:
        """Take over what another process has seen; images seen by both count once."""
        self.images = {**other.images, **self.images}

    @abstractmethod
    def add(self, index: int, outputs: Outputs, truth: Truth, placement: Placement) -> None:
        """Take in the model's outputs for the image with this number in the data."""

    @abstractmethod
    def errors(self) -> dict[int, float]:
        """Compute how wrong the model was about each image; 0 where it was right."""

    def worst(self, count: int = 24) -> list[int]:
        """List the images that the model was most wrong about, worst first, without those that it got right."""
        errors = self.errors()
        return sorted((index for index in errors if errors[index]), key=lambda index: (-errors[index], index))[:count]

    @abstractmethod
    def report(self) -> Report:
        """Compute the figures from all images seen so far."""

    @abstractmethod
    def draw(self, indices: Sequence[int], images: Sequence[Image.Image], truths: Sequence[Truth]) -> Image.Image:
        """Draw predictions and truths of some of the images seen on one sheet."""


def save_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def save_confusion_matrix(
    confusion: NDArray[np.int64], names: Sequence[str], folder: Path, *, title: str, as_shares: bool = False
) -> None:
    """Write `confusion_matrix.csv`, and `confusion_matrix.png` of up to `MOST_IN_MATRIX` classes.

    Rows are the true classes, columns the predicted ones. `as_shares` writes shares of the rows instead of counts.
    """
    rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
    save_csv(folder / "confusion_matrix.csv", [["true \\ predicted", *names], *rows])
    if len(names) > MOST_IN_MATRIX:
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
    for (row, column), share in np.ndenumerate(shares):
        text = f"{share:.0%}" if as_shares else f"{confusion[row, column]:,}"
        if text not in ("0", "0%"):
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    save_figure(figure, folder / "confusion_matrix.png", box=True)


def save_bars(
    path: Path, names: Sequence[str], series: Mapping[str, Sequence[float]], colors: Sequence[object], *,
    title: str, form: str,
) -> None:  # fmt: skip
    """Draw a horizontal bar for each name, from the top, and each series of values from 0 to 1.

    Several series have a legend. Names have passed `plot_text`; a series has one color, or one for each bar.
    """
    figure = new_figure(7, 1.6 + (0.16 + 0.1 * len(series)) * max(len(names), 2))
    axes = figure.add_subplot()
    rows, height = np.arange(len(names)), 0.8 / len(series)
    for number, ((label, values), color) in enumerate(zip(series.items(), colors, strict=True)):
        bars = axes.barh(rows + (number + 0.5) * height - 0.4, values, height, color=color, label=label)
        axes.bar_label(bars, [format(value, form) for value in values], padding=3, fontsize=7)
    axes.set_yticks(rows, names, parse_math=False)
    axes.set(xlim=(0, 1.1), ylim=(max(len(names), 1) - 0.4, -0.6), title=title)
    if len(series) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(series), fontsize=8, frameon=False)
    save_figure(figure, path)


def plot_text(name: str, longest: int = 40) -> str:
    """A class name as matplotlib can write it, for a folder's need not be UTF-8; those with $ need parse_math=False."""
    text = name.encode(errors="replace").decode()
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _plain(value: object) -> object:
    """A value for JSON; floats to six places."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, np.ndarray):
        return value.round(6).tolist()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, ClassScores):
        return {name: _plain(item) for name, item in vars(value).items()}
    return value
