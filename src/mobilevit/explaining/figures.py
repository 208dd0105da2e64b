"""The two figures of `explain`: where a pixel's attention goes, and how a map is unfolded into sequences.

Axes count in pixels of the view, the part of the image that the model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mobilevit.imaging.drawing import class_colors, fit, font
from mobilevit.models.mobilevit import fold, unfold
from mobilevit.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mobilevit.explaining.attention import BlockAttention

Point = tuple[float, float]
"""(x, y) in pixels of the view."""

_MARK = "#00c8ff"
"""The chosen pixel: unlike any color of the heat."""
_CELL = 128
"""Longer side of the small images, in pixels."""
_WINDOW = (8, 12)
"""(height, width) of the part of a map whose pixels are shown one by one."""
_TILE = 16
"""Side of such a pixel, with its edge."""
_CAPTION: dict[str, Any] = {"loc": "left", "fontsize": 8, "color": "#606060"}
_TITLE: dict[str, Any] = {"x": 0.005, "ha": "left", "fontsize": 10}


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

    Args:
        view: the part of the image that the model sees.
        blocks: attention in each.
        class_activation: evidence for the class, 0 to 1. Shape: (h, w).
        title: names the class.
        place: of the chosen pixel, on `view`.
        corners: upper left and lower right of the object that is explained, if it is one.
    """
    tall = min(1.0, view.height / view.width)
    heights = [2.7 * tall + 0.7, *(max(2.6, 0.98 * len(block.weights)) * tall + 0.9 for block in blocks)]
    figure = new_figure(9.0, sum(heights))
    top, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    heading = top.suptitle(title, **_TITLE, parse_math=False)
    # matplotlib's own font lacks many scripts, so that such class names need another one of this machine.
    path = getattr(font(12, title), "path", None)
    if isinstance(path, str):
        heading.set_fontproperties(Path(path))
    heading.set_fontsize(14)
    seen, evidence, scale = top.subplots(1, 3)
    _show(seen, view, "input of the model")
    _mark(seen, place)
    if corners is not None:
        _frame(seen, *corners, "white")
    _show(evidence, _heated(view, class_activation, smooth=True), "evidence for the class (Grad-CAM)")
    strip = _heated(Image.new("RGB", (150, 10), (128, 128, 128)), np.linspace(0, 1, 150, dtype=np.float32)[None])
    _show(scale, strip, "from none to most, for each image alone")
    for part, block in zip(parts, blocks, strict=True):
        layers = len(block.weights)
        part.suptitle(f"{_title(block)}, {block.num_tokens} patches; {layers} layers", **_TITLE)
        rollout, grid = part.subplots(1, 2, width_ratios=(1, 2))
        _draw_rollout(rollout, view, block)
        _draw_layers(grid, fit(view, _CELL), block)
    return _rendered(figure)


def _draw_rollout(axes: Axes, view: Image.Image, block: BlockAttention) -> None:
    """Attention through all layers of a block."""
    (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
    values = block.rollout.copy()
    # The chosen pixel's own patch would outshine the rest, as every layer adds to its input.
    values[row // ph, column // pw] = 0
    _show(axes, _heated(view, values), "all layers; own patch (blue) left out\ndots: the pixels it can attend to")
    across, down = view.width / width, view.height / height
    ys, xs = np.mgrid[row % ph : height : ph, column % pw : width : pw]
    if xs.size <= 400:  # else there is no room for dots
        axes.plot((xs.ravel() + 0.5) * across, (ys.ravel() + 0.5) * down, ".", color="white", markersize=2)
    corner = (column // pw * pw * across, row // ph * ph * down)
    _frame(axes, corner, (corner[0] + pw * across, corner[1] + ph * down), _MARK)
    _mark(axes, ((column + 0.5) * across, (row + 0.5) * down))


def _draw_layers(axes: Axes, small: Image.Image, block: BlockAttention) -> None:
    """Attention in each layer (rows) and head (columns), as one mosaic."""
    (height, width), (row, column) = block.map_size, block.pixel
    layers, heads = block.weights.shape[:2]
    maps = np.concatenate([block.weights.mean(axis=1, keepdims=True), block.weights], axis=1)
    gap = ((0, 8), (0, 8), (0, 0))
    rows = [
        np.concatenate([np.pad(_heated(small, weights), gap, constant_values=255) for weights in layer], axis=1)
        for layer in maps
    ]
    axes.imshow(np.concatenate(rows))
    lefts, tops = np.arange(heads + 1) * (small.width + 8), np.arange(layers) * (small.height + 8)
    xs, ys = np.meshgrid(lefts + (column + 0.5) * small.width / width, tops + (row + 0.5) * small.height / height)
    axes.plot(xs.ravel(), ys.ravel(), "o", markersize=4, markerfacecolor="none", markeredgecolor=_MARK)
    axes.set_xticks(lefts + small.width / 2, ["all heads", *(f"head {n + 1}" for n in range(heads))], fontsize=8)
    axes.set_yticks(tops + small.height / 2, [f"layer {n + 1}" for n in range(layers)], fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    axes.set_anchor("NW")


def patches_figure(view: Image.Image, blocks: Sequence[BlockAttention]) -> Image.Image:
    """Draw for each block the image in patches, the offsets in them, the sequences, the tensor, and the map again."""
    row = 2.6 * min(1.0, view.height / view.width) + 0.9
    figure = new_figure(14.0, 0.5 + row * len(blocks))
    heights = [0.5, *[row] * len(blocks)]
    top, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    told = (
        "Patches, unfold and fold: with the colors of the image at the size of each map; the model has vectors instead"
    )
    top.suptitle(told, **_TITLE)
    for part, block in zip(parts, blocks, strict=True):
        part.suptitle(_title(block), **_TITLE)
        _draw_unfolding(part.subplots(1, 5), view, block)
    return _rendered(figure)


def _draw_unfolding(axes: Sequence[Axes], view: Image.Image, block: BlockAttention) -> None:
    (height, width), (ph, pw), num_tokens = block.map_size, block.patch_size, block.num_tokens
    grid, closeup, sequences, tensor, folded = axes
    small = np.asarray(view.resize((width, height), Image.Resampling.BOX), np.float32)
    colors = np.array(class_colors(ph * pw), np.float32).reshape(ph, pw, 3)
    offsets = np.tile(colors, (height // ph, width // pw, 1))

    _show(grid, view, f"N = {height // ph} x {width // pw} = {num_tokens} patches")
    across, down = view.width / width, view.height / height
    grid.hlines(np.arange(ph, height, ph) * down, 0, view.width, color="white", linewidth=0.7)
    grid.vlines(np.arange(pw, width, pw) * across, 0, view.height, color="white", linewidth=0.7)
    top, bottom, left, right = _window(block)
    if (bottom - top, right - left) != block.map_size:
        grid.set_title(f"{grid.get_title('left')}\nframed: the part shown next", **_CAPTION)
        _frame(grid, (left * across, top * down), (right * across, bottom * down), "white")

    part = slice(top, bottom), slice(left, right)
    count = ph * pw
    told = f"P = {ph} x {pw} = {count} offsets, one color each;\npixels of one color attend to each other"
    _show(closeup, _tiles(small[part], offsets[part]), told)
    for row in range(ph, bottom - top, ph):
        closeup.axhline(row * _TILE - 0.5, color="white", linewidth=2)
    for column in range(pw, right - left, pw):
        closeup.axvline(column * _TILE - 0.5, color="white", linewidth=2)
    told = f"unfold: P = {count} sequences,\neach a small image of N = {num_tokens} tokens"
    _show(sequences, _mosaic(small, colors), told)
    tokens, edges = (unfold(torch.from_numpy(v).permute(2, 0, 1)[None], block.patch_size) for v in (small, offsets))
    shown = min(num_tokens, max(12, count))
    told = f"tensor: {count} rows (P), {num_tokens} columns (N)"
    told += "" if shown == num_tokens else f"\nthe first {shown} columns"
    _show(tensor, _tiles(tokens.numpy()[:, :shown], edges.numpy()[:, :shown]), told)
    again = fold(tokens, block.map_size, block.patch_size)[0].permute(1, 2, 0).numpy()
    _show(folded, again.round().astype(np.uint8), f"fold: every token at its pixel again,\n{height} x {width}")
    folded.set_aspect(down / across)


def _window(block: BlockAttention) -> tuple[int, int, int, int]:
    """Choose some whole patches around the chosen pixel: top, bottom, left, right."""
    found = []
    for most, side, patch, at in zip(_WINDOW, block.map_size, block.patch_size, block.pixel, strict=True):
        length = min(side, max(2 * patch, most // patch * patch))
        first = min(max(0, (at - length // 2) // patch * patch), side - length)
        found += [first, first + length]
    return found[0], found[1], found[2], found[3]


def _tiles(inside: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Enlarge every pixel to a tile with an edge of another color. Shape: (R, C, 3), (R, C, 3) -> (16 R, 16 C, 3)."""
    large, border = (values.repeat(_TILE, axis=0).repeat(_TILE, axis=1) for values in (inside, edges))
    inner = np.pad(np.ones((_TILE - 6, _TILE - 6), bool), 3)
    shown = np.where(np.tile(inner, inside.shape[:2])[..., None], large, border)
    return shown.round().astype(np.uint8)


def _mosaic(small: NDArray[np.float32], colors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay every sequence out as its patches lie, in a frame of its color. Shape: (H, W, 3), (ph, pw, 3) -> image."""
    ph, pw, _ = colors.shape
    rows, columns = small.shape[0] // ph, small.shape[1] // pw
    enlarge = max(1, 48 // max(rows, columns))
    tokens = small.reshape(rows, ph, columns, pw, 3).transpose(1, 0, 3, 2, 4)
    tokens = 0.8 * tokens.repeat(enlarge, axis=1).repeat(enlarge, axis=3) + 0.2 * colors[:, None, :, None]
    height, width = rows * enlarge + 4, columns * enlarge + 4
    frames = np.broadcast_to(colors[:, None, :, None], (ph, height, pw, width, 3)).copy()
    frames[:, 2:-2, :, 2:-2] = tokens
    return frames.reshape(ph * height, pw * width, 3).round().astype(np.uint8)


def _heated(image: Image.Image, values: NDArray[np.float32], *, smooth: bool = False) -> NDArray[np.uint8]:
    """Lay the colors of heat, relative to the largest value, over an image in pale gray."""
    from matplotlib import colormaps

    share = Image.fromarray((values / max(float(values.max()), 1e-12)).astype(np.float32))
    heat = np.asarray(share.resize(image.size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST))
    heat = heat.clip(0, 1)
    gray = 60 + 0.65 * np.asarray(image.convert("L"), float)[..., None]  # never so dark that heat cannot be told
    cover = 0.8 * np.sqrt(heat)[..., None]
    # From dark violet on, as black would hide the image.
    color = 255 * colormaps["inferno"](0.2 + 0.8 * heat)[..., :3]
    blended: NDArray[np.uint8] = (gray * (1 - cover) + color * cover).astype(np.uint8)
    return blended


def _title(block: BlockAttention) -> str:
    (height, width), (ph, pw), before = block.map_size, block.patch_size, block.map_size_before
    resized = "" if before == block.map_size else f" (from {before[0]} x {before[1]}, to fit the patches)"
    return f"{block.name}: stride {block.stride}, map of {height} x {width}{resized} in patches of {ph} x {pw}"


def _show(axes: Axes, image: Image.Image | NDArray[np.uint8], caption: str) -> None:
    axes.imshow(image)
    axes.set_title(caption, **_CAPTION)
    axes.set_axis_off()
    axes.set_anchor("NW")


def _mark(axes: Axes, place: Point) -> None:
    for color, width in (("black", 4), (_MARK, 1.5)):
        axes.plot(*place, "o", markersize=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=width)


def _frame(axes: Axes, corner: Point, opposite: Point, color: str) -> None:
    from matplotlib.patches import Rectangle

    size = opposite[0] - corner[0], opposite[1] - corner[1]
    for edge, width in (("black", 3), (color, 1.5)):
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=edge, linewidth=width))


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
