"""The two figures of `explain`: where a pixel's attention goes, and how a map is unfolded into sequences.

Axes count in pixels of the view, the part of the image that the model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mobilevit.imaging.drawing import class_colors, fit, font
from mobilevit.models.mobilevit import fold, unfold
from mobilevit.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from mobilevit.explaining.attention import BlockAttention

Point = tuple[float, float]
"""(x, y) in pixels of the view."""

_MARK = "#00c8ff"
"""The chosen pixel: unlike any color of the heat."""
_CELL = 128
"""Longer side of the small images, in pixels."""
_WINDOW = (8, 12)
"""(height, width) of the part of a map whose pixels are shown one by one."""


def attention_figure(
    view: Image.Image,
    blocks: Sequence[BlockAttention],
    class_activation: NDArray[np.float32],
    *,
    title: str,
    place: Point,
    corners: tuple[Point, Point] | None,
) -> Image.Image:
    """Draw the image and its class activation; then, for each block, where the attention of the chosen pixel goes.

    `corners` are the upper left and lower right of the object that is explained, if it is one.
    """
    tall = min(1.0, view.height / view.width)
    heights = [2.7 * tall + 0.7, *(max(2.6, 0.98 * len(_grid(block)[0])) * tall + 0.9 for block in blocks)]
    figure = new_figure(9.0, sum(heights))
    top, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _head(top, title, size=14)
    seen, evidence, scale = top.subplots(1, 3)
    _show(seen, view, "input of the model")
    _mark(seen, place)
    if corners is not None:
        _frame(seen, *corners, "white")
    _heat(evidence, view, class_activation, smooth=True)
    _caption(evidence, "evidence for the class (Grad-CAM)")
    _heat(scale, Image.new("RGB", (150, 10), (128, 128, 128)), np.linspace(0, 1, 150, dtype=np.float32)[None])
    _caption(scale, "from none to most, for each image alone")
    for part, block in zip(parts, blocks, strict=True):
        _head(part, f"{_title(block)}, {block.num_tokens} patches; {len(block.weights)} layers")
        rollout, grid = part.subplots(1, 2, width_ratios=(1, 2))
        _draw_rollout(rollout, view, block)
        _draw_layers(grid, fit(view, _CELL), block)
    return _rendered(figure)


def _draw_rollout(axes: Axes, view: Image.Image, block: BlockAttention) -> None:
    """Draw attention through all layers of a block."""
    (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
    values = block.rollout.copy()
    # The chosen pixel's own patch would outshine the rest, as every layer adds to its input.
    values[row // ph, column // pw] = 0
    _heat(axes, view, values)
    told = "the pixels at its offset" if block.separable else "the pixels it can attend to"
    _caption(axes, f"all layers; own patch (blue) left out\ndots: {told}")
    across, down = view.width / width, view.height / height
    ys, xs = np.mgrid[row % ph : height : ph, column % pw : width : pw]
    if xs.size <= 400:  # else there is no room for dots
        axes.plot((xs.ravel() + 0.5) * across, (ys.ravel() + 0.5) * down, ".", color="white", markersize=2)
    corner = (column // pw * pw * across, row // ph * ph * down)
    _frame(axes, corner, (corner[0] + pw * across, corner[1] + ph * down), _MARK)
    _mark(axes, ((column + 0.5) * across, (row + 0.5) * down))


def _draw_layers(axes: Axes, small: Image.Image, block: BlockAttention) -> None:
    """Draw attention in each layer and head."""
    (height, width), (row, column), (row_names, column_names, maps) = block.map_size, block.pixel, _grid(block)
    lefts, tops = np.arange(len(column_names)) * (small.width + 8), np.arange(len(row_names)) * (small.height + 8)
    for down, across in np.ndindex(maps.shape[:2]):
        left, top = float(lefts[across]), float(tops[down])
        _heat(axes, small, maps[down, across], (left, top))
        x, y = left + (column + 0.5) * small.width / width, top + (row + 0.5) * small.height / height
        axes.plot(x, y, "o", markersize=4, markerfacecolor="none", markeredgecolor=_MARK)
    axes.set(xlim=(0, lefts[-1] + small.width), ylim=(tops[-1] + small.height, 0))
    axes.set_axis_on()
    axes.set_xticks(lefts + small.width / 2, column_names, fontsize=8)
    axes.set_yticks(tops + small.height / 2, row_names, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)


def _grid(block: BlockAttention) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Arrange the maps of all layers: names of rows, names of columns, (rows, columns, height, width)."""
    layers = [f"layer {number}" for number in range(1, len(block.weights) + 1)]
    if block.separable:  # by one head: layers side by side
        return ["context\nscores"], layers, block.weights.swapaxes(0, 1)
    heads = [f"head {number}" for number in range(1, block.weights.shape[1] + 1)]
    mean = block.weights.mean(axis=1, keepdims=True)
    return layers, ["all heads", *heads], np.concatenate([mean, block.weights], axis=1)


def patches_figure(view: Image.Image, blocks: Sequence[BlockAttention]) -> Image.Image:
    """Draw for each block the image in patches, the offsets in them, the sequences, and the map again."""
    row = 2.6 * min(1.0, view.height / view.width) + 0.9
    heights = [0.5, *[row] * len(blocks)]
    figure = new_figure(11.2, sum(heights))
    top, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _head(top, "Patches, unfold and fold: in the image's colors at the size of each map; the model has vectors instead")
    for part, block in zip(parts, blocks, strict=True):
        _head(part, _title(block))
        _draw_unfolding(part.subplots(1, 4), view, block)
    return _rendered(figure)


def _draw_unfolding(axes: Sequence[Axes], view: Image.Image, block: BlockAttention) -> None:
    (height, width), (ph, pw), num_tokens = block.map_size, block.patch_size, block.num_tokens
    grid, closeup, sequences, folded = axes
    small = np.array(view.resize((width, height), Image.Resampling.BOX))  # (H, W, 3)
    across, down = view.width / width, view.height / height

    top, bottom, left, right = _window(block)
    told = f"N = {height // ph} x {width // pw} = {num_tokens} patches"
    if (bottom - top, right - left) != block.map_size:
        told += "\nframed: the part shown next"
        _frame(grid, (left * across, top * down), (right * across, bottom * down), "white")
    _show(grid, view, told)
    grid.hlines(np.arange(ph, height, ph) * down, 0, view.width, color="white", linewidth=0.7)
    grid.vlines(np.arange(pw, width, pw) * across, 0, view.height, color="white", linewidth=0.7)

    count = ph * pw
    colors = np.array(class_colors(count)).reshape(ph, pw, 3) / 255
    shared = "share a context" if block.separable else "attend to each other"
    told = f"P = {ph} x {pw} = {count} offsets, one color each;\npixels of one color {shared}"
    _show(closeup, small[top:bottom, left:right], told)
    closeup.hlines(np.arange(ph, bottom - top, ph), 0, right - left, color="white", linewidth=2)
    closeup.vlines(np.arange(pw, right - left, pw), 0, bottom - top, color="white", linewidth=2)
    ys, xs = np.mgrid[: bottom - top, : right - left].reshape(2, -1)  # the window begins with a whole patch
    closeup.scatter(xs + 0.5, ys + 0.5, s=40, c=colors[ys % ph, xs % pw], edgecolors="white")

    for row, column in np.ndindex(ph, pw):
        corner, opposite = (1.1 * column, 1.1 * row), (1.1 * column + 1, 1.1 * row + 1)
        sequences.imshow(small[row::ph, column::pw], extent=(corner[0], opposite[0], opposite[1], corner[1]))
        _frame(sequences, corner, opposite, colors[row, column].tolist())
    sequences.set(xlim=(-0.1, 1.1 * pw), ylim=(1.1 * ph, -0.1), aspect=view.height / view.width)
    _caption(sequences, f"unfold: P = {count} sequences,\neach a small image of N = {num_tokens} tokens")

    tokens = unfold(torch.from_numpy(small).permute(2, 0, 1)[None], block.patch_size)  # (P, N, 3)
    again = fold(tokens, block.map_size, block.patch_size)[0].permute(1, 2, 0).numpy()
    _show(folded, again, f"fold: every token at its pixel again,\n{height} x {width}")
    folded.set_aspect(down / across)


def _window(block: BlockAttention) -> tuple[int, int, int, int]:
    """Choose some whole patches around the chosen pixel: top, bottom, left, right."""
    found = []
    for most, side, patch, at in zip(_WINDOW, block.map_size, block.patch_size, block.pixel, strict=True):
        length = min(side, max(2 * patch, most // patch * patch))
        first = min(max(0, (at - length // 2) // patch * patch), side - length)
        found += [first, first + length]
    return found[0], found[1], found[2], found[3]


def _heat(
    axes: Axes, image: Image.Image, values: NDArray[np.float32], corner: Point = (0, 0), *, smooth: bool = False
) -> None:
    """Draw an image in pale gray, and on it the colors of heat, relative to the largest value."""
    (left, top), largest = corner, max(float(values.max()), 1e-12)
    extent = (left, left + image.width, top + image.height, top)
    # Never so dark that heat cannot be told; heat from dark violet on, as black would hide the image.
    axes.imshow(60 + 0.65 * np.asarray(image.convert("L")), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.imshow(
        values,
        cmap="inferno",
        vmin=-largest / 4,
        vmax=largest,
        alpha=0.8 * np.sqrt(values / largest),
        extent=extent,
        interpolation="bicubic" if smooth else "nearest",
    )
    axes.set_axis_off()
    axes.set_anchor("NW")


def _title(block: BlockAttention) -> str:
    (height, width), (ph, pw), before = block.map_size, block.patch_size, block.map_size_before
    resized = "" if before == block.map_size else f" (from {before[0]} x {before[1]}, to fit the patches)"
    return f"{block.name}: stride {block.stride}, map of {height} x {width}{resized} in patches of {ph} x {pw}"


def _head(part: SubFigure, title: str, size: int = 10) -> None:
    heading = part.suptitle(title, x=0.005, ha="left", parse_math=False)
    # matplotlib's own font lacks many scripts, so that such class names need another one of this machine.
    path = getattr(font(12, title), "path", None)
    if isinstance(path, str):
        heading.set_fontproperties(Path(path))
    heading.set_fontsize(size)


def _show(axes: Axes, image: Image.Image | NDArray[np.uint8], caption: str) -> None:
    height, width = np.asarray(image).shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    _caption(axes, caption)


def _caption(axes: Axes, caption: str) -> None:
    axes.set_title(caption, loc="left", fontsize=8, color="#606060")
    axes.set_axis_off()
    axes.set_anchor("NW")


def _mark(axes: Axes, place: Point) -> None:
    for color, width in (("black", 4), (_MARK, 1.5)):
        axes.plot(*place, "o", markersize=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=width)


def _frame(axes: Axes, corner: Point, opposite: Point, color: str | Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    size = opposite[0] - corner[0], opposite[1] - corner[1]
    for edge, width in (("black", 3), (color, 1.5)):
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=edge, linewidth=width))


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
