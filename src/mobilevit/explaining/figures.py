"""The figures of `explain`, with Pillow and NumPy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mobilevit.imaging.drawing import class_colors, font
from mobilevit.models.mobilevit import fold, unfold

if TYPE_CHECKING:
    from mobilevit.explaining.explain import BlockAttention, Explanation

LARGE, SMALL, GAP, MARGIN = 256, 112, 10, 24
INK, FAINT, LINE = (30, 30, 30), (110, 110, 110), (225, 225, 225)
MARK = (0, 200, 255)
"""Of the chosen pixel: unlike any color of the heat."""
WINDOW = (8, 12)
"""(height, width) of the part of a map whose pixels are shown one by one."""

_HEAT = np.array([(70, 20, 120), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 245, 120)], float)
"""From little to the most, rising evenly in lightness."""


def attention_figure(explanation: Explanation) -> Image.Image:
    """The image and what spoke for the class; then, for each block, where its attention goes."""
    blocks = explanation.blocks
    heads = max(block.weights.shape[1] for block in blocks)
    seen, small = _fitted(explanation.view, LARGE), _fitted(explanation.view, SMALL)
    right = MARGIN + LARGE + 3 * GAP
    width = max(right + 56 + (heads + 1) * (SMALL + GAP), MARGIN + 2 * (LARGE + 3 * GAP)) + MARGIN
    heights = [56 + max(seen.height + 48, 20 + b.weights.shape[0] * (small.height + GAP)) for b in blocks]
    top = 92 + seen.height + 40
    page = Image.new("RGB", (width, top + sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    x, y = explanation.pixel
    _text(pen, (MARGIN, 20), f"{explanation.label}  {explanation.score:.1%}", 24, INK)
    _text(pen, (MARGIN, 54), f"what pixel ({x}, {y}) attends to, and what spoke for the class", 14, FAINT)
    place = _scaled(explanation.to_view(x + 0.5, y + 0.5), explanation.view, seen)
    image = seen.copy()
    if explanation.box_xyxy is not None:
        left, upper, rest, lower = explanation.box_xyxy
        corners = [
            _scaled(explanation.to_view(*corner), explanation.view, seen) for corner in ((left, upper), (rest, lower))
        ]
        ImageDraw.Draw(image).rectangle([*corners[0], *corners[1]], outline="white", width=2)
    page.paste(_marked(image, place), (MARGIN, 92))
    page.paste(_heated(seen, explanation.class_activation, smooth=True), (right, 92))
    _text(pen, (MARGIN, 92 + seen.height + 6), "what the model sees", 12, FAINT)
    _text(pen, (right, 92 + seen.height + 6), "what spoke for the class (Grad-CAM)", 12, FAINT)
    _draw_scale(page, pen, (right + seen.width + 3 * GAP, 92))
    for block, height in zip(blocks, heights, strict=True):
        _draw_block(page, pen, (seen, small), block, top, right)
        top += height
    return page


def _draw_block(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    images: tuple[Image.Image, Image.Image],
    block: BlockAttention,
    top: int,
    right: int,
) -> None:
    seen, small = images
    layers, heads = block.weights.shape[:2]
    pen.line([(MARGIN, top), (page.width - MARGIN, top)], fill=LINE)
    _text(pen, (MARGIN, top + 12), f"{_title(block)}, {block.num_tokens} patches; {layers} layers", 15, INK)
    top += 44
    large = _heated(seen, _without_own(block))
    _draw_partners(large, block)
    page.paste(_marked(_own_patch(large, block), _place(block, seen.size)), (MARGIN, top))
    _text(pen, (MARGIN, top + seen.height + 6), "through all layers, but for its own patch (blue);", 12, FAINT)
    _text(pen, (MARGIN, top + seen.height + 21), "dots: all it can attend to, one in each patch", 12, FAINT)
    columns = [right + 56 + number * (SMALL + GAP) for number in range(heads + 1)]
    for left, name in zip(columns, ("all heads", *(f"head {head + 1}" for head in range(heads))), strict=True):
        _text(pen, (left, top), name, 12, FAINT)
    for layer in range(layers):
        down = top + 20 + layer * (small.height + GAP)
        _text(pen, (right, down + small.height // 2 - 8), f"layer {layer + 1}", 12, FAINT)
        for left, weights in zip(columns, (block.weights[layer].mean(axis=0), *block.weights[layer]), strict=True):
            page.paste(_marked(_heated(small, weights), _place(block, small.size), radius=3), (left, down))


def _title(block: BlockAttention) -> str:
    (height, width), (ph, pw), before = block.map_size, block.patch_size, block.map_size_before
    resized = "" if before == block.map_size else f" (from {before[0]} x {before[1]}, to fit the patches)"
    return f"{block.name}: stride {block.stride}, a map of {height} x {width}{resized} in patches of {ph} x {pw}"


def _draw_scale(page: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    left, top = corner
    strip = _heated(Image.new("RGB", (150, 12), (128, 128, 128)), np.linspace(0, 1, 150)[None])
    page.paste(strip, (left, top))
    _text(pen, (left, top + 16), "nothing", 12, FAINT)
    _text(pen, (left + 150 - round(font(12).getlength("the most")), top + 16), "the most", 12, FAINT)
    _text(pen, (left, top + 36), "in each image by itself", 12, FAINT)


def _without_own(block: BlockAttention) -> NDArray[Any]:
    """The rollout but for the chosen pixel's own patch, which would outshine the rest: layers add to what they get."""
    (ph, pw), (row, column) = block.patch_size, block.pixel
    values = block.rollout.copy()
    values[row // ph, column // pw] = 0
    return values


def _own_patch(image: Image.Image, block: BlockAttention) -> Image.Image:
    (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
    left, top = column // pw * pw / width * image.width, row // ph * ph / height * image.height
    corner = (left + pw / width * image.width - 1, top + ph / height * image.height - 1)
    ImageDraw.Draw(image).rectangle([(left, top), corner], outline=MARK, width=1)
    return image


def _draw_partners(image: Image.Image, block: BlockAttention) -> None:
    """A dot on every pixel of the map that the chosen one can attend to, if there is room for dots."""
    (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
    across, down = image.width / width, image.height / height
    room = min(across * pw, down * ph)
    if room < 5:
        return
    pen, radius = ImageDraw.Draw(image), 0.5 if room < 9 else 1 if room < 14 else 1.5
    for y in range(row % ph, height, ph):
        for x in range(column % pw, width, pw):
            middle = ((x + 0.5) * across, (y + 0.5) * down)
            pen.ellipse([middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius], fill="white")


def patches_figure(explanation: Explanation) -> Image.Image:
    """Of each block: the image in patches, some pixels by offset, the sequences they make, and the map again."""
    seen = _fitted(explanation.view, LARGE)
    page = Image.new("RGB", (2 * MARGIN + 5 * LARGE + 4 * 3 * GAP, 84 + 3 * (LARGE + 112)), "white")
    pen = ImageDraw.Draw(page)
    _text(pen, (MARGIN, 20), "Patches, unfold and fold", 24, INK)
    told = "Shown with the image's own colors at the size of each map; the model does this with vectors of features."
    _text(pen, (MARGIN, 54), told, 14, FAINT)
    top = 84
    for block in explanation.blocks:
        top += _draw_unfolding(page, pen, (explanation.view, seen), block, top)
    return page.crop((0, 0, page.width, top + MARGIN))


def _draw_unfolding(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    images: tuple[Image.Image, Image.Image],
    block: BlockAttention,
    top: int,
) -> int:
    """One block's row of the figure; its height."""
    view, seen = images
    (height, width), (ph, pw) = block.map_size, block.patch_size
    count, num_tokens = ph * pw, block.num_tokens
    pen.line([(MARGIN, top), (page.width - MARGIN, top)], fill=LINE)
    _text(pen, (MARGIN, top + 12), _title(block), 15, INK)
    start, top = top, top + 44
    small = np.asarray(view.resize((width, height), Image.Resampling.BOX), np.float32)
    tokens = unfold(torch.from_numpy(small.copy()).permute(2, 0, 1)[None], block.patch_size)
    folded = fold(tokens, block.map_size, block.patch_size)[0].permute(1, 2, 0).numpy()
    window = _window(block)
    lefts = [MARGIN + n * (LARGE + 3 * GAP) for n in range(5)]
    page.paste(_gridded(seen, block, window), (lefts[0], top))
    closeup = _closeup(small, block, window, LARGE)
    page.paste(closeup, (lefts[1], top))
    sequences = _sequences(small, block, seen.size)
    page.paste(sequences, (lefts[2], top))
    matrix, shown = _matrix(tokens.numpy(), _colors_by_sequence(block), LARGE)
    page.paste(matrix, (lefts[3], top))
    page.paste(_enlarged(folded, (seen.height, seen.width)), (lefts[4], top))
    rows, columns = window[1] - window[0], window[3] - window[2]
    whole = (rows, columns) == (height, width)
    notes = (
        (f"N = {height // ph} x {width // pw} = {num_tokens} patches", "" if whole else "framed: the part shown next"),
        (f"P = {ph} x {pw} = {count} offsets, one color each;", "pixels of one color attend to each other"),
        (f"unfold: P = {count} sequences, each a small", f"image of N = {num_tokens} tokens"),
        (
            f"the tensor: {count} rows (P), {num_tokens} columns (N)",
            "" if shown == num_tokens else f"the first {shown} are shown",
        ),
        (f"fold: every token back at its pixel, {height} x {width}", ""),
    )
    bottoms = (seen.height, closeup.height, sequences.height, matrix.height, seen.height)
    for left, bottom, lines in zip(lefts, bottoms, notes, strict=True):
        for number, line in enumerate(lines):
            _text(pen, (left, top + bottom + 8 + 17 * number), line, 12, FAINT)
    return top - start + max(bottoms) + 60


def _window(block: BlockAttention) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of some whole patches around the chosen pixel."""
    found = []
    for most, side, patch, at in zip(WINDOW, block.map_size, block.patch_size, block.pixel, strict=True):
        length = min(side, max(2 * patch, most // patch * patch))
        first = min(max(0, (at - length // 2) // patch * patch), side - length)
        found += [first, first + length]
    return found[0], found[1], found[2], found[3]


def _gridded(seen: Image.Image, block: BlockAttention, window: tuple[int, int, int, int]) -> Image.Image:
    """The image with the patches' borders, and the window that is shown next to it."""
    (height, width), (ph, pw) = block.map_size, block.patch_size
    across, down = seen.width / width, seen.height / height
    grid = Image.new("L", seen.size)
    pen = ImageDraw.Draw(grid)
    strength = 200 if min(across * pw, down * ph) > 16 else 110
    for row in range(ph, height, ph):
        pen.line([(0, round(row * down)), (seen.width, round(row * down))], fill=strength)
    for column in range(pw, width, pw):
        pen.line([(round(column * across), 0), (round(column * across), seen.height)], fill=strength)
    image = Image.composite(Image.new("RGB", seen.size, "white"), seen, grid)
    top, bottom, left, right = window
    if (bottom - top, right - left) != block.map_size:
        corners = [(left * across, top * down), (right * across - 1, bottom * down - 1)]
        ImageDraw.Draw(image).rectangle(corners, outline=INK, width=4)
        ImageDraw.Draw(image).rectangle(corners, outline="white", width=2)
    return image


def _closeup(small: NDArray[Any], block: BlockAttention, window: tuple[int, int, int, int], side: int) -> Image.Image:
    """Single pixels of the map, each with an edge in the color of its place in its patch, apart by patches."""
    (ph, pw), (top, bottom, left, right) = block.patch_size, window
    colors = _offset_colors(ph, pw)
    cell = side // max(bottom - top, right - left)
    image = Image.new("RGB", ((right - left) * cell, (bottom - top) * cell), "white")
    pen, edge = ImageDraw.Draw(image), max(2, cell // 7)
    for row in range(top, bottom):
        for column in range(left, right):
            x, y = (column - left) * cell, (row - top) * cell
            _token(pen, (x, y, x + cell - 1, y + cell - 1), small[row, column], colors[row % ph, column % pw], edge)
    for row in range(ph, bottom - top, ph):
        pen.line([(0, row * cell), (image.width, row * cell)], fill="white", width=3)
    for column in range(pw, right - left, pw):
        pen.line([(column * cell, 0), (column * cell, image.height)], fill="white", width=3)
    return image


def _sequences(small: NDArray[Any], block: BlockAttention, room: tuple[int, int]) -> Image.Image:
    """Each sequence, its tokens laid out as the patches lie: the image again, at a fraction of its size."""
    ph, pw = block.patch_size
    colors = _offset_colors(ph, pw)
    image = Image.new("RGB", room, "white")
    pen = ImageDraw.Draw(image)
    across, down = room[0] // pw, room[1] // ph
    edge = 2 if min(across, down) > 24 else 1
    for row in range(ph):
        for column in range(pw):
            part = 0.8 * small[row::ph, column::pw] + 0.2 * colors[row, column]
            left, top = column * across, row * down
            pen.rectangle([left, top, left + across - 3, top + down - 3], fill=_color(colors[row, column]))
            size = (max(1, down - 2 - 2 * edge), max(1, across - 2 - 2 * edge))
            image.paste(_enlarged(part, size), (left + edge, top + edge))
    return image


def _matrix(tokens: NDArray[Any], colors: NDArray[Any], side: int) -> tuple[Image.Image, int]:
    """The tensor that `unfold` returns, a row for each sequence, and how many columns there was room for.

    Shape: tokens (P, N, 3), colors (P, 3).
    """
    rows, columns, _ = tokens.shape
    cell = max(4, min(20, side // rows))
    shown = min(columns, (side - 20) // cell)
    cut = shown < columns
    image = Image.new("RGB", (shown * cell + (20 if cut else 0), rows * cell), "white")
    pen, edge = ImageDraw.Draw(image), max(1, cell // 8)
    for row in range(rows):
        for column in range(shown):
            x, y = column * cell, row * cell
            _token(pen, (x, y, x + cell - 2, y + cell - 2), tokens[row, column], colors[row], edge)
    if cut:
        _text(pen, (shown * cell + 4, image.height // 2 - 12), "...", 14, FAINT)
    return image, shown


def _colors_by_sequence(block: BlockAttention) -> NDArray[Any]:
    """The colors of offsets, in the order in which `unfold` puts the sequences. Shape: (P, 3)."""
    colors = torch.from_numpy(_offset_colors(*block.patch_size)).permute(2, 0, 1)[None]
    ordered: NDArray[Any] = unfold(colors, block.patch_size)[:, 0].numpy()
    return ordered


def _token(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], inside: NDArray[Any], edge: NDArray[Any], thick: int
) -> None:
    pen.rectangle(box, fill=_color(inside), outline=_color(edge), width=thick)


def _color(values: NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue


def _offset_colors(ph: int, pw: int) -> NDArray[Any]:
    """One color for each place in a patch. Shape: (ph, pw, 3)."""
    return np.array(class_colors(ph * pw), float).reshape(ph, pw, 3)


def _enlarged(pixels: NDArray[Any], shape: tuple[int, int]) -> Image.Image:
    """With hard edges, so that every pixel of a map shows."""
    return Image.fromarray(pixels.round().astype(np.uint8)).resize(shape[::-1], Image.Resampling.NEAREST)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _heated(image: Image.Image, values: NDArray[Any], *, smooth: bool = False) -> Image.Image:
    """An image in pale gray under the colors of heat, which are relative to the largest value."""
    share = Image.fromarray((values / max(float(values.max()), 1e-12)).astype(np.float32))
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    heat = np.asarray(share.resize(image.size, resample))[..., None].clip(0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    color = np.concatenate([np.interp(heat, stops, _HEAT[:, channel]) for channel in range(3)], axis=2)
    gray = 60 + 0.65 * np.asarray(image.convert("L"), float)[..., None]  # never so dark that heat cannot be told
    cover = 0.8 * np.sqrt(heat)
    return Image.fromarray((gray * (1 - cover) + color * cover).clip(0, 255).astype(np.uint8))


def _scaled(at: tuple[float, float], of: Image.Image, to: Image.Image) -> tuple[float, float]:
    return at[0] * to.width / of.width, at[1] * to.height / of.height


def _place(block: BlockAttention, size: tuple[int, int]) -> tuple[float, float]:
    """The middle of the chosen pixel of a map, on an image of that (width, height)."""
    (height, width), (row, column) = block.map_size, block.pixel
    return (column + 0.5) * size[0] / width, (row + 0.5) * size[1] / height


def _marked(image: Image.Image, place: tuple[float, float], radius: float = 6) -> Image.Image:
    image = image.copy()
    pen = ImageDraw.Draw(image)
    x, y = place
    for grow, color in ((1.5, "black"), (0, MARK)):
        r = radius + grow
        pen.ellipse([x - r, y - r, x + r, y + r], outline=color, width=2 if grow == 0 else 5)
    return image


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, color: tuple[int, int, int]) -> None:
    pen.text(at, text, fill=color, font=font(size, text))
