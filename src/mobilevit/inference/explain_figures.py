"""The figures of `explain`, with Pillow and NumPy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mobilevit.drawing import class_colours, font

if TYPE_CHECKING:
    from mobilevit.inference.explain import BlockAttention, Explanation

LARGE, SMALL, GAP, MARGIN = 224, 104, 10, 24
INK, FAINT = (30, 30, 30), (110, 110, 110)
MARK = (0, 200, 255)
"""Of the chosen pixel: unlike any colour of the heat."""

_HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], float)
"""From nothing to the most, rising evenly in lightness."""


def attention_figure(explanation: Explanation) -> Image.Image:
    """The picture and what spoke for the class; then, for each block, where its attention goes."""
    blocks = explanation.blocks
    heads = max(block.weights.shape[1] for block in blocks)
    right = MARGIN + LARGE + 3 * GAP
    width = max(right + 56 + (heads + 1) * (SMALL + GAP), MARGIN + 2 * (LARGE + 3 * GAP)) + MARGIN
    heights = [44 + max(LARGE + 44, 22 + block.weights.shape[0] * (SMALL + GAP)) for block in blocks]
    top = 92 + LARGE + 30
    page = Image.new("RGB", (width, top + sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    x, y = explanation.pixel
    _text(pen, (MARGIN, 20), f"{explanation.label}  {explanation.score:.1%}", 24, INK)
    _text(pen, (MARGIN, 54), f"what pixel ({x}, {y}) attends to, and what spoke for the class", 14, FAINT)
    seen = _fitted(explanation.input_image, LARGE)
    page.paste(_marked(seen, _place(blocks[0], seen.size)), (MARGIN, 92))
    page.paste(_heated(seen, explanation.class_activation), (right, 92))
    _text(pen, (MARGIN, 92 + LARGE + 6), "what the model sees", 12, FAINT)
    _text(pen, (right, 92 + LARGE + 6), "what spoke for the class (Grad-CAM)", 12, FAINT)
    for block, height in zip(blocks, heights, strict=True):
        _draw_block(page, pen, seen, block, (MARGIN, top), right)
        top += height
    return page


def _draw_block(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    seen: Image.Image,
    block: BlockAttention,
    corner: tuple[int, int],
    right: int,
) -> None:
    left, top = corner
    (ph, pw), layers = block.patch_size, block.weights.shape[0]
    title = f"{block.name}: stride {block.stride}, patches of {ph} x {pw}, {block.num_tokens} tokens, {layers} layers"
    pen.line([(left, top), (page.width - MARGIN, top)], fill=(225, 225, 225))
    _text(pen, (left, top + 12), title, 15, INK)
    top += 44
    place = _place(block, seen.size)
    large = _heated(seen, block.rollout)
    _draw_partners(large, block)
    page.paste(_marked(large, place), (left, top))
    _text(pen, (left, top + seen.height + 6), "through all layers; dots: the pixels it can", 12, FAINT)
    _text(pen, (left, top + seen.height + 21), "attend to, one in each patch", 12, FAINT)
    small = seen.resize((SMALL * seen.width // LARGE, SMALL * seen.height // LARGE), Image.Resampling.LANCZOS)
    heads = block.weights.shape[1]
    columns = [right + 56 + number * (SMALL + GAP) for number in range(heads + 1)]
    for left, name in zip(columns, ("all heads", *(f"head {head + 1}" for head in range(heads))), strict=True):
        _text(pen, (left, top), name, 12, FAINT)
    for layer in range(layers):
        down = top + 20 + layer * (SMALL + GAP)
        _text(pen, (right, down + small.height // 2 - 8), f"layer {layer + 1}", 12, FAINT)
        for left, weights in zip(columns, (block.weights[layer].mean(axis=0), *block.weights[layer]), strict=True):
            page.paste(_marked(_heated(small, weights), _place(block, small.size), radius=3), (left, down))


def _draw_partners(image: Image.Image, block: BlockAttention) -> None:
    """A dot on every pixel of the map that the chosen one can attend to, if there is room for dots."""
    (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
    across, down = image.width / width, image.height / height
    if min(across * pw, down * ph) < 9:
        return
    pen = ImageDraw.Draw(image)
    for y in range(row % ph, height, ph):
        for x in range(column % pw, width, pw):
            middle = ((x + 0.5) * across, (y + 0.5) * down)
            pen.ellipse([middle[0] - 1.5, middle[1] - 1.5, middle[0] + 1.5, middle[1] + 1.5], fill="white")


def patches_figure(explanation: Explanation) -> Image.Image:
    """Of each block: the map's pixels in patches, the sequences they make, and the map folded back."""
    blocks = explanation.blocks
    side = LARGE + 32
    width = 2 * MARGIN + 4 * side + 3 * (3 * GAP)
    row_height = 44 + side + 60
    page = Image.new("RGB", (width, 84 + len(blocks) * row_height + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    _text(pen, (MARGIN, 20), "Patches, unfold and fold", 24, INK)
    told = "Shown on the picture itself, at the size of each map; the model does this with feature vectors."
    _text(pen, (MARGIN, 54), told, 14, FAINT)
    for number, block in enumerate(blocks):
        _draw_unfolding(page, pen, explanation.input_image, block, 84 + number * row_height, side)
    return page


def _draw_unfolding(
    page: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, block: BlockAttention, top: int, side: int
) -> None:
    (height, width), (ph, pw) = block.map_size, block.patch_size
    pixels = ph * pw
    pen.line([(MARGIN, top), (page.width - MARGIN, top)], fill=(225, 225, 225))
    _text(pen, (MARGIN, top + 12), f"{block.name}: a map of {height} x {width} in patches of {ph} x {pw}", 15, INK)
    top += 44
    small = np.asarray(picture.resize((width, height), Image.Resampling.BOX), float)
    colours = _offset_colours(ph, pw)
    tint = colours[np.arange(height)[:, None] % ph, np.arange(width)[None] % pw]
    scale = side / max(height, width)
    shape = (round(height * scale), round(width * scale))
    lefts = [MARGIN + n * (side + 3 * GAP) for n in range(4)]
    grid = _enlarged(small, shape)
    _draw_grid(grid, block)
    page.paste(grid, (lefts[0], top))
    coloured = _enlarged(0.35 * small + 0.65 * tint, shape)
    _draw_grid(coloured, block)
    page.paste(coloured, (lefts[1], top))
    # Each sequence, laid out as the patches lie: the picture at a pw-th of its width and a ph-th of its height.
    inner = 6
    for row in range(ph):
        for column in range(pw):
            part = 0.7 * small[row::ph, column::pw] + 0.3 * colours[row, column]
            room = (shape[0] // ph - inner, shape[1] // pw - inner)
            tile = _enlarged(part, (max(room[0], 1), max(room[1], 1)))
            corner = (lefts[2] + column * shape[1] // pw, top + row * shape[0] // ph)
            edge = tuple(int(value) for value in colours[row, column])
            pen.rectangle([corner[0], corner[1], corner[0] + tile.width + 3, corner[1] + tile.height + 3], fill=edge)
            page.paste(tile, (corner[0] + 2, corner[1] + 2))
    page.paste(_enlarged(small, shape), (lefts[3], top))
    below = top + shape[0] + 8
    notes = (
        (f"H x W = {height} x {width} pixels,", f"N = {block.num_tokens} patches"),
        (f"P = {ph} x {pw} = {pixels} offsets;", "pixels of one colour attend to each other"),
        (f"unfold: P = {pixels} sequences", f"of N = {block.num_tokens} tokens each"),
        ("fold: every token back at its pixel,", "nothing lost"),
    )
    for left, lines in zip(lefts, notes, strict=True):
        for number, line in enumerate(lines):
            _text(pen, (left, below + 17 * number), line, 13, FAINT)


def _offset_colours(ph: int, pw: int) -> NDArray[Any]:
    """One colour for each place in a patch. Shape: (ph, pw, 3)."""
    return np.array(class_colours(ph * pw), float).reshape(ph, pw, 3)


def _draw_grid(image: Image.Image, block: BlockAttention) -> None:
    (height, width), (ph, pw) = block.map_size, block.patch_size
    pen = ImageDraw.Draw(image)
    for row in range(0, height + 1, ph):
        y = min(round(row * image.height / height), image.height - 1)
        pen.line([(0, y), (image.width, y)], fill="white")
    for column in range(0, width + 1, pw):
        x = min(round(column * image.width / width), image.width - 1)
        pen.line([(x, 0), (x, image.height)], fill="white")


def _enlarged(pixels: NDArray[Any], shape: tuple[int, int]) -> Image.Image:
    """With hard edges, so that every pixel of a map shows."""
    return Image.fromarray(pixels.round().astype(np.uint8)).resize(shape[::-1], Image.Resampling.NEAREST)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _heated(image: Image.Image, values: NDArray[Any]) -> Image.Image:
    """A picture in grey under the colours of heat, which are relative to the largest value."""
    share = Image.fromarray((values / max(float(values.max()), 1e-12)).astype(np.float32)).resize(
        image.size, Image.Resampling.NEAREST if values.shape[0] < 33 else Image.Resampling.BILINEAR
    )
    heat = np.asarray(share)[..., None].clip(0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    colour = np.concatenate([np.interp(heat, stops, _HEAT[:, channel]) for channel in range(3)], axis=2)
    grey = np.asarray(image.convert("L"), float)[..., None]
    cover = 0.35 + 0.4 * heat
    return Image.fromarray((grey * (1 - cover) + colour * cover).clip(0, 255).astype(np.uint8))


def _place(block: BlockAttention, size: tuple[int, int]) -> tuple[float, float]:
    """The middle of the chosen pixel of a map, on a picture of that (width, height)."""
    (height, width), (row, column) = block.map_size, block.pixel
    return (column + 0.5) * size[0] / width, (row + 0.5) * size[1] / height


def _marked(image: Image.Image, place: tuple[float, float], radius: float = 6) -> Image.Image:
    image = image.copy()
    pen = ImageDraw.Draw(image)
    x, y = place
    for grow, colour in ((1.5, "black"), (0, MARK)):
        r = radius + grow
        pen.ellipse([x - r, y - r, x + r, y + r], outline=colour, width=2 if grow == 0 else 5)
    return image


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]) -> None:
    pen.text(at, text, fill=colour, font=font(size, text))
