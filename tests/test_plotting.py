"""The look that all plots share."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mobilevit.plotting import new_figure, save_figure


def test_figures_are_written_without_the_upper_and_right_edge(tmp_path: Path) -> None:
    figure = new_figure(4, 3)
    left, right = figure.subplots(1, 2)
    save_figure(figure, tmp_path / "plot.png")
    for axes in (left, right):
        shown = {name: spine.get_visible() for name, spine in axes.spines.items()}
        assert shown == {"left": True, "bottom": True, "right": False, "top": False}
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (480, 360)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_a_box_keeps_all_edges(tmp_path: Path) -> None:
    figure = new_figure(2, 2)
    axes = figure.add_subplot()
    save_figure(figure, tmp_path / "matrix.png", box=True)
    assert all(spine.get_visible() for spine in axes.spines.values())
