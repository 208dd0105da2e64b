"""Draws the figures of the documentation into docs/images/: `python docs/figures.py`.

Which pixel lands in which sequence is asked of the model's own `unfold` and `fold`, and every shape and count is read
off the real model, so that an image cannot say anything the code does not do.
"""
# ruff: noqa: RUF001  figures write a multiplication sign where code writes an x

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from torch import Tensor

from mobilevit.explaining.attention import attention_weights
from mobilevit.models.mobilevit import Attention, MobileViT, MobileViTBlock, S, fold, unfold
from mobilevit.models.mobilevitv2 import SeparableAttention

IMAGES = Path(__file__).parent / "images"
PATCH = (2, 2)

# The four offsets wear colors of Okabe and Ito's palette, which color-blind readers can tell apart.
OFFSETS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
ON_OFFSETS = ("white", "#1F2933", "white", "#1F2933")  # text on each of them
PLAIN = "#8D99A6"
INK, MUTED, LINE, PAPER = "#1F2933", "#5F6C7B", "#C5CDD6", "#F4F6F8"
CONV, CONV_EDGE = "#DCEBF7", "#0072B2"
VIT, VIT_EDGE = "#FDF0D5", "#C98700"
ATTEND, ATTEND_EDGE = "#DDF1EA", "#00805E"

mpl.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, draw in {
        "patches": draw_patches,
        "unfold": draw_unfold,
        "attention_cost": draw_attention_cost,
        "separable_attention": draw_separable_attention,
        "architecture": draw_architecture,
    }.items():
        path = save(draw(), IMAGES / f"{name}.png")
        print(f"{path.relative_to(IMAGES.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


def save(figure: Figure, path: Path) -> Path:
    """A PNG at twice the size it is shown at, with a palette of 256 colors to keep it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200)
    plt.close(figure)
    image = Image.open(buffer).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


# ------------------------------------------------------------------------------------------- what the model says


def pixels_by_sequence(height: int, width: int) -> list[list[int]]:
    """For each sequence the pixels in it, in order, as indices into the row-major map; from `unfold` itself."""
    index = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    tokens = unfold(index, PATCH)  # (P, N, 1)
    assert torch.equal(fold(tokens, (height, width), PATCH), index)
    return tokens[..., 0].long().tolist()  # type: ignore[no-any-return]


def sequence_of_pixels(height: int, width: int) -> np.ndarray:
    """(height, width): the number of the sequence that each pixel lands in."""
    owner = np.empty(height * width, dtype=int)
    for sequence, pixels in enumerate(pixels_by_sequence(height, width)):
        owner[pixels] = sequence
    return owner.reshape(height, width)


def model_s() -> tuple[MobileViT, dict[str, Tensor]]:
    """MobileViT S and the output of each of its parts on an image of 256 x 256."""
    model = MobileViT(S).eval()
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    with torch.no_grad():
        model(torch.rand(1, 3, 256, 256))
    return model, outputs


# ------------------------------------------------------------------------------------------- drawing


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose axes count inches from the bottom left."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    *,
    fill: str = PAPER,
    edge: str = LINE,
    size: float = 9.5,
    weight: str = "normal",
) -> None:
    """A rounded box with its bottom left corner at (x, y) and centered text."""
    style = "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, weight=weight)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = MUTED) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4, shrinkA=0, shrinkB=0
        )
    )


def path(axes: Axes, *points: tuple[float, float], color: str = MUTED) -> None:
    """A line through the points, with an arrow head at the last."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color=color, linewidth=1.4, solid_joinstyle="round", solid_capstyle="butt")
    arrow(axes, points[-2], points[-1], color=color)


def pixel(axes: Axes, x: float, y: float, side: float, fill: object, *, label: str = "", color: str = "white") -> None:
    axes.add_patch(Rectangle((x, y), side, side, facecolor=fill, edgecolor="white", linewidth=0.7))
    if label:
        axes.text(x + side / 2, y + side / 2, label, ha="center", va="center", fontsize=8.5, color=color, weight="bold")


def join(axes: Axes, x: float, y: float) -> None:
    """A circled plus: where a skip meets the main path."""
    axes.add_patch(Circle((x, y), 0.095, facecolor="white", edgecolor=MUTED, linewidth=1.2, zorder=3))
    axes.plot([x - 0.05, x + 0.05], [y, y], color=INK, linewidth=1.2, zorder=4)
    axes.plot([x, x], [y - 0.05, y + 0.05], color=INK, linewidth=1.2, zorder=4)


def patch_borders(axes: Axes, x: float, y: float, side: float, height: int, width: int) -> None:
    """The borders between patches of a map of height x width pixels."""
    ph, pw = PATCH
    for row in range(0, height, ph):
        for column in range(0, width, pw):
            corner = (x + column * side, y + (height - row - ph) * side)
            axes.add_patch(Rectangle(corner, pw * side, ph * side, fill=False, edgecolor=INK, linewidth=1.1))


def flower(size: int) -> np.ndarray:
    """A flower before a hill and the sky, drawn by formula at three times the size: RGB in 0..1, (size, size, 3)."""
    row, column = np.mgrid[0 : size * 3, 0 : size * 3] / (size * 3)
    image = np.empty((*row.shape, 3))
    image[:] = (0.76, 0.88, 0.96)  # sky
    image[np.hypot(row - 0.14, column - 0.86) < 0.09] = (0.99, 0.86, 0.45)  # sun
    image[row > 0.72 + 0.05 * np.sin(7 * column + 0.5)] = (0.68, 0.82, 0.56)  # hill
    image[row > 0.88 + 0.02 * np.sin(9 * column + 2.0)] = (0.47, 0.67, 0.40)  # meadow
    image[(abs(column - 0.4375) < 0.032) & (row > 0.45)] = (0.22, 0.46, 0.24)  # stem
    for side in (-1, 1):
        leaf = np.hypot((row - 0.78 + 0.5 * side * (column - 0.4375)) / 0.05, (column - 0.4375 - side * 0.13) / 0.12)
        image[leaf < 1] = (0.28, 0.55, 0.30)
    for petal in range(6):
        angle = np.pi / 3 * petal + np.pi / 6
        middle = (0.375 + 0.185 * np.sin(angle), 0.4375 + 0.185 * np.cos(angle))
        image[np.hypot(row - middle[0], column - middle[1]) < 0.098] = (0.85, 0.25, 0.36)
    image[np.hypot(row - 0.375, column - 0.4375) < 0.105] = (0.98, 0.78, 0.25)
    return image.reshape(size, 3, size, 3, 3).mean((1, 3))


# ------------------------------------------------------------------------------------------- figures


def draw_patches() -> Figure:
    """An image as a small map, its pixels by offset, and what one of them attends to."""
    count, side, gap = 16, 0.164, 0.28  # layer4 makes 16 x 16 of an image of 256 x 256
    length = count * side
    figure, axes = canvas(3 * length + 4 * gap, length + 1.5)
    image, owner = flower(480), sequence_of_pixels(count, count)
    bottom = 0.98
    lefts = [gap + panel * (length + gap) for panel in range(3)]
    titles = ("1  A map in 2 × 2 patches", "2  Offsets in the patch", "3  What one pixel sees")
    for left, title in zip(lefts, titles, strict=True):
        axes.text(left, bottom + length + 0.16, title, fontsize=11, weight="bold")

    query = (8, 9)  # (row, column) of the pixel that asks
    for left, strength in ((lefts[0], 1.0), (lefts[2], 0.4)):
        extent = (left, left + length, bottom, bottom + length)
        axes.imshow(1 - strength * (1 - image), extent=extent, aspect="auto", interpolation="bilinear")
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(0, figure.get_figheight()))
    for row in range(count):
        for column in range(count):
            y, color = bottom + (count - 1 - row) * side, OFFSETS[owner[row, column]]
            same = owner[row, column] == owner[query]
            for left, fill in zip(lefts, ("none", color, color if same else "none"), strict=True):
                pixel(axes, left + column * side, y, side, fill)
    for left in lefts:
        patch_borders(axes, left, bottom, side, count, count)
    center = (lefts[2] + (query[1] + 0.5) * side, bottom + (count - 0.5 - query[0]) * side)
    for color, thickness in (("white", 5.5), (INK, 2.4)):
        axes.add_patch(Circle(center, side * 0.95, fill=False, edgecolor=color, linewidth=thickness))

    patches = count * count // 4
    captions = (
        (lefts[0], f"256 × 256 pixels are {count} × {count} at stride 16:\nN = {patches} patches of P = 4 pixels"),
        (
            lefts[2],
            f"The ringed pixel attends to the {patches} at its\noffset. The 3 × 3 convolution before has\n"
            "mixed their neighbors into them.",
        ),
    )
    for left, caption in captions:
        axes.text(left, bottom - 0.14, caption, fontsize=9, color=MUTED, va="top", linespacing=1.4)
    for row in range(2):
        for column in range(2):
            x, y = lefts[1] + column * 1.3, bottom - 0.34 - row * 0.27
            pixel(axes, x, y, 0.18, OFFSETS[owner[row, column]])
            place = f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
            axes.text(x + 0.26, y + 0.085, place, fontsize=9, color=MUTED, va="center")
    return figure


def draw_unfold() -> Figure:
    """Map -> sequences -> attention inside each -> map."""
    count, side = 6, 0.3
    sequences = pixels_by_sequence(count, count)
    length = len(sequences[0])
    owner = sequence_of_pixels(count, count)
    figure, axes = canvas(9.3, 4.0)
    bottom, extent = 1.13, count * side
    middle = bottom + extent / 2

    def draw_map(left: float, mark: str) -> None:
        for row in range(count):
            for column in range(count):
                corner, offset = (left + column * side, bottom + (count - 1 - row) * side), owner[row, column]
                label = f"{row * count + column}{mark}"
                pixel(axes, *corner, side, OFFSETS[offset], label=label, color=ON_OFFSETS[offset])
        patch_borders(axes, left, bottom, side, count, count)

    def heading(x: float, text: str, shape: str) -> None:
        axes.text(x, 3.66, text, ha="center", fontsize=11, weight="bold")
        axes.text(x, 3.43, shape, ha="center", fontsize=9, color=MUTED)

    left_map, left_rows, left_weights, left_end = 0.25, 2.83, 5.86, 7.25
    draw_map(left_map, "")
    draw_map(left_end, "′")
    heading(left_map + extent / 2, "Map", "D × 6 × 6")
    heading(left_rows + length * side / 2, f"{len(sequences)} sequences of {length} tokens", "P × N × D = 4 × 9 × D")
    heading(left_weights + 0.29, "Attention", "9 × 9 each")
    heading(left_end + extent / 2, "Map", "D × 6 × 6")

    pitch, cell = 0.58, 0.055
    for sequence, pixels in enumerate(sequences):
        y = middle + (1.5 - sequence) * pitch
        for place, index in enumerate(pixels):
            corner = (left_rows + place * side, y - side / 2)
            pixel(axes, *corner, side, OFFSETS[sequence], label=str(index), color=ON_OFFSETS[sequence])
        arrow(axes, (left_rows + length * side + 0.05, y), (left_weights - 0.02, y))
        weights = np.random.default_rng(sequence).random((length, length)) ** 1.6
        ink = np.array(mpl.colors.to_rgb(OFFSETS[sequence]))
        for i in range(length):
            for j in range(length):
                shade = 1 - (0.15 + 0.85 * weights[i, j]) * (1 - ink)
                corner = (left_weights + 0.04 + j * cell, y + (i - length / 2) * cell)
                axes.add_patch(Rectangle(corner, cell, cell, facecolor=shade, edgecolor="white", linewidth=0.4))

    for start, end, text in ((left_map + extent, left_rows, "unfold"), (left_weights + 0.55, left_end, "fold")):
        arrow(axes, (start + 0.1, middle), (end - 0.1, middle), color=INK)
        axes.text((start + end) / 2, middle + 0.1, text, ha="center", fontsize=10.5, weight="bold", color=INK)
    axes.text(
        left_map,
        0.42,
        "Numbers count the pixels of the map. A prime marks what attention has changed; the weights are for show.\n"
        "Every sequence is one offset of the 2 × 2 patch. fold puts each token back where unfold took it from.",
        fontsize=9,
        color=MUTED,
        va="center",
        linespacing=1.5,
    )
    return figure


def draw_attention_cost() -> Figure:
    """Pairs of pixels that attention compares: every pair, or pairs at the same offset only."""
    figure, axes = canvas(9.3, 3.62)
    side = 14
    sequences, length = unfold(torch.zeros(1, 1, side, side), PATCH).shape[:2]
    plain, same = (side * side) ** 2, sequences * length**2

    left, bottom, extent, top = 0.25, 0.78, 2.05, 3.27
    right, block = left + extent + 0.3, extent / sequences
    axes.text(left, top, f"Pairs compared in a map of {side} × {side}", fontsize=11, weight="bold")
    counts = (
        (left, "every pixel with every pixel", plain, f"= {side * side}² · C"),
        (right, "same offset only", same, f"= {sequences} · {length}² · C"),
    )
    for x, title, cost, sum_of in counts:
        axes.text(x, bottom + extent + 0.1, title, fontsize=9, color=MUTED)
        axes.add_patch(Rectangle((x, bottom), extent, extent, facecolor=PAPER, edgecolor=LINE, linewidth=1))
        axes.text(x + extent / 2, bottom - 0.28, f"{cost:,} · C", fontsize=12, weight="bold", ha="center")
        axes.text(x + extent / 2, bottom - 0.52, sum_of, fontsize=9, color=MUTED, ha="center")
    axes.add_patch(Rectangle((left, bottom), extent, extent, facecolor=PLAIN, edgecolor="none"))
    for sequence in range(sequences):
        corner = (right + sequence * block, bottom + extent - (sequence + 1) * block)
        axes.add_patch(Rectangle(corner, block, block, facecolor=OFFSETS[sequence], edgecolor="none"))

    edge = 5.05
    axes.text(edge, top, "In one layer of the model at 256 × 256", fontsize=11, weight="bold")
    chart = figure.add_axes(((edge + 0.75) / 9.3, bottom / 3.62, (9.05 - edge - 0.75) / 9.3, 2.0 / 3.62))
    for position, (name, stride) in enumerate((("layer5", 32), ("layer4", 16), ("layer3", 8))):
        size = 256 // stride
        sequences, length = unfold(torch.zeros(1, 1, size, size), PATCH).shape[:2]
        pairs = {PLAIN: size**4, OFFSETS[0]: sequences * length**2}
        chart.plot(pairs.values(), [position] * 2, color=LINE, linewidth=3, zorder=1)
        for color, value in pairs.items():
            chart.scatter(value, position, s=75, color=color, zorder=2)
            # The two stand close together on this scale: the smaller number goes below its dot.
            below = color != PLAIN
            chart.annotate(
                f"{value:,} · C",
                (value, position),
                xytext=(0, -9 if below else 9),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=9,
                color=OFFSETS[0] if below else INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
        chart.text(
            -0.03, position, f"{name}\n{size} × {size}", transform=chart.get_yaxis_transform(), ha="right", va="center"
        )
    chart.set_xscale("log")
    chart.set_xlim(250, 6e6)
    chart.set_ylim(-0.6, 2.5)
    chart.set_yticks([])
    chart.grid(axis="x", color="#E6EAEE", linewidth=0.8)
    chart.set_axisbelow(True)
    chart.set_xlabel("pairs × channels, logarithmic", fontsize=9, color=MUTED)
    chart.tick_params(axis="x", which="both", length=0, labelsize=8.5, labelcolor=MUTED)
    chart.spines[["top", "right", "left"]].set_visible(False)
    for x, color, label in (
        (edge + 0.08, PLAIN, "every pixel"),
        (edge + 1.35, OFFSETS[0], "same offset, 2 × 2 patches"),
    ):
        axes.add_patch(Circle((x, bottom + extent + 0.14), 0.055, color=color))
        axes.text(x + 0.13, bottom + extent + 0.14, label, va="center", fontsize=9, color=MUTED)
    return figure


def draw_separable_attention() -> Figure:
    """How the tokens at one offset are joined: by a matrix of weights, or by one score for each and a context."""
    figure, axes = canvas(9.3, 4.5)
    pixels, side, dim = pixels_by_sequence(6, 6)[0], 0.27, 16
    count, top = len(pixels), 3.52
    torch.manual_seed(3)
    x = 3 * torch.randn(1, count, dim)
    matrix = attention_weights(Attention(dim, 1), x)[0, 0].detach().numpy()
    scores = attention_weights(SeparableAttention(dim), 2 * x)[0, 0, 0].detach().numpy()
    ink = np.array(mpl.colors.to_rgb(OFFSETS[0]))
    middles = [top - (row + 0.5) * side for row in range(count)]
    center = top - count * side / 2

    def tokens(left: float, title: str, mark: str = "") -> None:
        axes.text(left + side / 2, top + 0.14, title, fontsize=9, color=MUTED, ha="center")
        for middle, index in zip(middles, pixels, strict=True):
            pixel(axes, left, middle - side / 2, side, OFFSETS[0], label=f"{index}{mark}")

    def weights(left: float, values: np.ndarray) -> None:
        """Each row of `values` beside its token, darkest at the largest of all."""
        for (row, column), value in np.ndenumerate(values):
            shade = 1 - (0.08 + 0.92 * value / values.max()) * (1 - ink)
            pixel(axes, left + column * side, middles[row] - side / 2, side, shade)

    def caption(left: float, told: str, cost: str, sum_of: str) -> None:
        axes.text(left, 0.88, told, fontsize=9, color=MUTED, va="top", linespacing=1.4)
        axes.text(left, 0.2, cost, fontsize=12, weight="bold")
        axes.text(left + 1.0, 0.2, f"{sum_of}, in a map of 14 × 14", fontsize=9, color=MUTED)

    sequences, length = unfold(torch.zeros(1, 1, 14, 14), PATCH).shape[:2]
    left, matrix_at, after = 0.25, 0.85, 3.98
    axes.text(left, 4.12, "Multi-head attention (MobileViT)", fontsize=11, weight="bold")
    tokens(left, "tokens")
    weights(matrix_at, matrix)
    axes.text(
        matrix_at + count * side / 2, top + 0.14, "N × N weights, in each head", fontsize=9, color=MUTED, ha="center"
    )
    arrow(axes, (left + side + 0.06, center), (matrix_at - 0.05, center))
    arrow(axes, (matrix_at + count * side + 0.06, center), (after - 0.06, center))
    axes.text((matrix_at + count * side + after) / 2, center + 0.12, "· values", fontsize=9, color=MUTED, ha="center")
    tokens(after, "tokens", "′")
    told = "Every token is compared with every token,\nand sums the values with its own weights."
    caption(left, told, f"{sequences * length**2:,} · C", f"= {sequences} · {length}² · C")

    left, scores_at, context_at, after = 4.98, 5.58, 6.72, 8.6
    axes.plot([4.62, 4.62], [0.2, 4.25], color=LINE, linewidth=1)
    axes.text(left, 4.12, "Separable attention (MobileViTv2)", fontsize=11, weight="bold")
    tokens(left, "tokens")
    weights(scores_at, scores[:, None])
    axes.text(scores_at + side / 2, top + 0.14, "N scores", fontsize=9, color=MUTED, ha="center")
    arrow(axes, (left + side + 0.06, center), (scores_at - 0.05, center))
    for middle, score in zip(middles, scores, strict=True):
        strength = float(score / scores.max())
        start, end = (scores_at + side, middle), (context_at, center)
        axes.plot(
            *zip(start, end, strict=True), color=OFFSETS[0], linewidth=0.5 + 2.5 * strength, alpha=0.25 + 0.7 * strength
        )
        arrow(axes, (context_at + 0.5, center), (after - 0.05, middle), color=LINE)
    box(axes, context_at, center - 0.62, 0.5, 1.24, fill=ATTEND, edge=ATTEND_EDGE)
    axes.text(context_at + 0.25, center, "context", rotation=90, fontsize=9.5, ha="center", va="center")
    axes.text(context_at + 0.25, center + 0.72, "sum,\nkey", fontsize=9, color=MUTED, ha="center")
    axes.text(
        7.86, center, "· ReLU(values)", fontsize=9, color=MUTED, ha="center", va="center", backgroundcolor="white"
    )
    tokens(after, "tokens", "′")
    told = "One score for each token, one sum of all, the context;\nit multiplies the values of every token."
    caption(left, told, f"{sequences * length:,} · C", f"= {sequences} · {length} · C")
    return figure


def draw_architecture() -> Figure:
    """MobileViT S from image to logits, and the inside of its two blocks."""
    model, outputs = model_s()
    figure, axes = canvas(9.3, 10.3)

    def shape(name: str) -> str:
        return " × ".join(str(n) for n in outputs[name].shape[1:])

    def parameters(name: str) -> str:
        return f"{sum(p.numel() for p in model.get_submodule(name).parameters()):,}"

    def block_title(name: str) -> str:
        block = model.get_submodule(name)[1]
        assert isinstance(block, MobileViTBlock)
        return f"MobileViT block\nL = {len(block.transformer)},  D = {block.norm.normalized_shape[0]}"

    x, width, gap = 0.25, 2.2, 0.32
    shape_at, stride_at, parameters_at = x + width + 0.17, 4.12, 5.05
    axes.text(x, 9.93, "MobileViT S at 256 × 256", fontsize=13, weight="bold")
    axes.text(x, 9.68, "↓2: stride 2", fontsize=9, color=MUTED)
    axes.text(shape_at, 9.68, "shape", fontsize=9, color=MUTED)
    axes.text(stride_at, 9.68, "stride", fontsize=9, color=MUTED, ha="right")
    axes.text(parameters_at, 9.68, "parameters", fontsize=9, color=MUTED, ha="right")
    conv, vit, plain = (CONV, CONV_EDGE), (VIT, VIT_EDGE), (PAPER, LINE)
    rows: list[tuple[list[tuple[str, tuple[str, str]]], str, str, str]] = [
        ([("RGB in 0..1", plain)], "3 × 256 × 256", "1", ""),
        ([("stem: 3 × 3 conv ↓2", conv)], shape("stem"), "2", parameters("stem")),
        ([("layer1: MV2", conv)], shape("layer1"), "2", parameters("layer1")),
        ([("layer2: MV2 ↓2, MV2, MV2", conv)], shape("layer2"), "4", parameters("layer2")),
    ]
    for name, stride in (("layer3", "8"), ("layer4", "16"), ("layer5", "32")):
        rows.append(([(f"{name}: MV2 ↓2", conv), (block_title(name), vit)], shape(name), stride, parameters(name)))
    rows += [
        ([("1 × 1 conv", conv)], shape("head_conv"), "32", parameters("head_conv")),
        ([("mean of the map, dropout", plain)], shape("classifier_dropout"), "", ""),
        ([("linear", plain)], shape("classifier"), "", parameters("classifier")),
    ]
    y = 9.53
    for number, (parts, size, stride, count) in enumerate(rows):
        for part, (text, (fill, edge)) in enumerate(parts):
            tall = 0.54 if "\n" in text else 0.4
            y -= tall + (0.06 if part else 0)
            box(axes, x, y, width, tall, text, fill=fill, edge=edge)
        center = y + tall / 2
        axes.text(shape_at, center, size, fontsize=9.5, va="center")
        axes.text(stride_at, center, stride, fontsize=9.5, va="center", ha="right")
        axes.text(parameters_at, center, count, fontsize=9.5, va="center", ha="right")
        if number + 1 < len(rows):
            arrow(axes, (x + width / 2, y), (x + width / 2, y - gap))
            y -= gap
    total = sum(p.numel() for p in model.parameters())
    axes.plot([shape_at, parameters_at], [y - 0.05, y - 0.05], color=LINE, linewidth=1)
    axes.text(shape_at, y - 0.22, "together", fontsize=9.5, va="center", color=MUTED)
    axes.text(parameters_at, y - 0.22, f"{total:,}", fontsize=9.5, va="center", ha="right", weight="bold")

    axes.plot([5.38, 5.38], [0.4, 9.95], color=LINE, linewidth=1)
    draw_mobilevit_block(axes, 6.02, 9.93)
    draw_inverted_residual(axes, 6.02, 2.44)
    return figure


def draw_mobilevit_block(axes: Axes, x: float, top: float) -> None:
    width, tall, step = 2.25, 0.38, 0.57
    middle, shape_at, lane = x + width / 2, x + width + 0.27, x - 0.36
    axes.text(lane, top, "Inside a MobileViT block", fontsize=13, weight="bold")
    entry, y = top - 0.2, top - 0.85

    def row(text: str, shape: str, fill: str, edge: str) -> None:
        nonlocal y
        box(axes, x, y, width, tall, text, fill=fill, edge=edge)
        axes.text(shape_at, y + tall / 2, shape, fontsize=9.5, va="center")
        arrow(axes, (middle, y), (middle, y - step + tall))
        y -= step

    axes.text(shape_at, entry - 0.1, "C, H, W", fontsize=9.5, va="center")
    arrow(axes, (middle, entry), (middle, y + tall))
    row("3 × 3 conv, BN, SiLU", "C, H, W", CONV, CONV_EDGE)
    row("1 × 1 conv", "D, H, W", CONV, CONV_EDGE)
    row("unfold", "P, N, D", VIT, VIT_EDGE)

    ceiling = y + tall
    floor = ceiling - 2.4
    box(axes, x - 0.16, floor, width + 0.32, 2.4, fill="white", edge=ATTEND_EDGE)
    axes.text(shape_at, (ceiling + floor) / 2, "P, N, D\n\nL times", fontsize=9.5, va="center")
    inside, skip, start = 1.75, x + width + 0.03, ceiling
    for text in ("LayerNorm\nattention, 4 heads", "LayerNorm\nlinear, SiLU, linear"):
        base, branch = start - 0.8, start - 0.1
        box(axes, middle - inside / 2, base, inside, 0.54, text, fill=ATTEND, edge=ATTEND_EDGE, size=9)
        plus = base - 0.24
        arrow(axes, (middle, start), (middle, base + 0.54))
        path(axes, (middle, branch), (skip, branch), (skip, plus), (middle + 0.1, plus))
        axes.plot([middle, middle], [base, plus], color=MUTED, linewidth=1.4)
        join(axes, middle, plus)
        start = plus - 0.095
    y = floor - 0.22 - tall
    arrow(axes, (middle, start), (middle, y + tall))
    row("LayerNorm, fold", "D, H, W", VIT, VIT_EDGE)
    row("1 × 1 conv, BN, SiLU", "C, H, W", CONV, CONV_EDGE)
    path(axes, (middle, entry - 0.1), (lane, entry - 0.1), (lane, y + tall / 2), (x, y + tall / 2))
    row("concatenate", "2C, H, W", PAPER, LINE)
    row("3 × 3 conv, BN, SiLU", "C, H, W", CONV, CONV_EDGE)


def draw_inverted_residual(axes: Axes, x: float, top: float) -> None:
    width, tall, step = 2.25, 0.36, 0.55
    middle, skip = x + width / 2, x + width + 0.2
    axes.text(x - 0.36, top, "Inside an MV2 block", fontsize=13, weight="bold")
    entry, y = top - 0.16, top - 0.78
    arrow(axes, (middle, entry), (middle, y + tall))
    for text in ("1 × 1 conv, BN, SiLU", "3 × 3 depthwise, BN, SiLU", "1 × 1 conv, BN"):
        box(axes, x, y, width, tall, text, fill=CONV, edge=CONV_EDGE)
        y -= step
        arrow(axes, (middle, y + step), (middle, y + tall))
    plus = y + tall - 0.095
    path(axes, (middle, entry - 0.08), (skip, entry - 0.08), (skip, plus), (middle + 0.1, plus))
    join(axes, middle, plus)
    axes.text(skip + 0.07, top - 1.15, "if stride\nis 1 and\nchannels\nare equal", fontsize=9, va="center", color=MUTED)


if __name__ == "__main__":
    main()
