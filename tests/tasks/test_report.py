import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from mobilevit.tasks.report import plot_text, save_bars, save_confusion_matrix, save_csv

NAMES = [["cat", "dog", "owl"], ['a "b"', "c, d", "größer 猫"], ["US$ 5 and $6", r"$\frac$"]]


def random_confusion(num_classes: int) -> np.ndarray:
    return np.random.default_rng(num_classes).integers(0, 40, (num_classes, num_classes))


def texts_in(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], str]:
    """What is written into the squares of the images to come, by row and column."""
    written: dict[tuple[int, int], str] = {}
    write = Axes.text

    def note(axes: Axes, x: int, y: int, text: str, **settings: Any) -> object:
        written[y, x] = text
        return write(axes, x, y, text, **settings)

    monkeypatch.setattr(Axes, "text", note)
    return written


@pytest.mark.parametrize("names", NAMES)
def test_confusion_matrix_files(tmp_path: Path, names: list[str]) -> None:
    confusion = random_confusion(len(names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks
        save_confusion_matrix(confusion, names, tmp_path, title="82.5% right")
    with (tmp_path / "confusion_matrix.csv").open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["true \\ predicted", *names]
    assert [row[0] for row in rows] == names
    assert [[int(count) for count in row[1:]] for row in rows] == confusion.tolist()
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        assert image.width == image.height == round(120 * (2.2 + 0.5 * len(names)))
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # shades of blue and black text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion_matrix.csv", "confusion_matrix.png"]


def test_confusion_matrix_shades(tmp_path: Path) -> None:
    save_confusion_matrix(np.array([[10, 0], [0, 10]]), ["a", "b"], tmp_path, title="all right")
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        colors = image.convert("RGB").getcolors(1 << 20)
    dark_blue = sum(count for count, color in colors if color == (8, 48, 107))  # the end of the scale
    pale_blue = sum(count for count, color in colors if color == (247, 251, 255))
    assert 0.8 < dark_blue / pale_blue < 1.1  # the diagonal and the rest; the digits stand on the dark squares


@pytest.mark.parametrize(
    ("as_shares", "expected"),
    [
        (False, {(0, 0): "2,999", (0, 1): "1", (1, 0): "5", (1, 1): "15"}),
        (True, {(0, 0): "100%", (1, 0): "25%", (1, 1): "75%"}),  # what rounds to nothing is left out
    ],
)
def test_squares_hold_counts_or_shares_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_shares: bool, expected: dict[tuple[int, int], str]
) -> None:
    written = texts_in(monkeypatch)
    confusion = np.array([[2999, 1, 0], [5, 15, 0], [0, 0, 0]])
    save_confusion_matrix(confusion, list("abc"), tmp_path, title="", as_shares=as_shares)
    assert written == expected
    assert (tmp_path / "confusion_matrix.csv").read_text().splitlines()[1:] == ["a,2999,1,0", "b,5,15,0", "c,0,0,0"]


def test_bars(tmp_path: Path) -> None:
    save_bars(tmp_path / "one.png", ["a", "b"], {"x": [0.5, 1]}, [["#ff0000", "#0000ff"]], title="", form=".1%")
    save_bars(tmp_path / "two.png", ["a"], {"x": [0.5], "y": [1]}, ["#ff0000", "#0000ff"], title="", form=".3f")
    save_bars(tmp_path / "none.png", [], {"x": []}, [[]], title="", form=".3f")
    for name in ("one", "two"):
        with Image.open(tmp_path / f"{name}.png") as image:
            counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}
        assert counts[0, 0, 255] == pytest.approx(2 * counts[255, 0, 0], rel=0.1 if name == "one" else 0.3)


def test_csv(tmp_path: Path) -> None:
    save_csv(tmp_path / "new" / "a.csv", [["name", "ap"], ['a "b", c', None], ["größer 猫", 0.5]])
    text = (tmp_path / "new" / "a.csv").read_text(encoding="utf-8")
    assert text == 'name,ap\n"a ""b"", c",\ngrößer 猫,0.5\n'


@pytest.mark.parametrize("name", ["a\udcffb.txt", "x" * 40])
def test_plot_text_keeps_the_length_and_can_be_encoded(name: str) -> None:
    assert plot_text(name) == name.replace("\udcff", "?")


def test_plot_text_shortens() -> None:
    assert plot_text("x" * 41) == "x" * 37 + "..."
    assert plot_text("x" * 10, 8) == "xxxxx..."
