from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.imaging.drawing import (
    BLACK,
    RGB,
    WHITE,
    background,
    class_colors,
    contact_sheet,
    draw_boxes,
    draw_label_map,
    draw_outlines,
    fit,
    save_image,
    text_color,
    with_caption,
    with_legend,
)

INK = (30, 30, 30)


def inked(strip: Image.Image) -> np.ndarray:
    """Where something stands on white. Shape: (height, width)."""
    return (np.asarray(strip) < 200).any(axis=2)


def extent(lines: np.ndarray) -> int:
    """From the first to the last True."""
    (found,) = np.nonzero(lines)
    return int(found[-1] - found[0] + 1)


@pytest.mark.parametrize(
    ("width", "height", "type_size"),  # a capital's height is about 0.7 of it
    [(60, 60, 11), (154, 200, 11), (280, 100, 20), (560, 560, 40), (2000, 1500, 40)],
)
def test_caption_size_follows_the_image(width: int, height: int, type_size: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    captioned = with_caption(image, ["HIT"])
    pad = type_size // 3
    assert captioned.size == (width, height + type_size + 2 * pad)
    assert captioned.crop((0, 0, width, height)).tobytes() == image.tobytes()
    ink = inked(captioned.crop((0, height, width, captioned.height)))
    assert 0.6 * type_size <= extent(ink.any(axis=1)) <= 0.9 * type_size
    assert ink.any(axis=0)[:pad].sum() == 0
    assert not ink[0].any()
    assert not ink[-1].any()


def test_lines_stand_below_each_other() -> None:
    image = Image.new("RGB", (280, 50), "navy")
    assert with_caption(image, []).height == 50 + 6
    assert with_caption(image, ["A", "B", "C"]).height == 50 + 3 * 26 + 6
    ink = inked(with_caption(image, ["HHH", "", "HHH"]).crop((0, 50, 280, 134))).any(axis=1)
    assert [bool(ink[6 + 26 * row : 32 + 26 * row].any()) for row in range(3)] == [True, False, True]


def test_captions_have_the_color_asked_for() -> None:
    strip = np.asarray(with_caption(Image.new("RGB", (280, 9)), ["HHHH"], color=(190, 40, 30)))[9:]
    assert (strip == (190, 40, 30)).all(axis=2).any()
    assert not (strip == INK).all(axis=2).any()


@pytest.mark.parametrize("width", [40, 120, 300])
def test_long_labels_are_shortened_to_the_width(width: int) -> None:
    image = Image.new("RGB", (width, 10), "white")
    size = max(11, width // 14)
    strips = [
        np.asarray(with_caption(image, [text]))[10:] for text in ("giant schnauzer " * 20, "giant schnauzer " * 21)
    ]
    assert np.array_equal(*strips)
    ink = inked(Image.fromarray(strips[0])).any(axis=0)
    assert not ink[width - size // 3 + 1 :].any()
    assert ink[width // 2 :].any()
    dots = inked(Image.fromarray(strips[0]))[:, : width - size // 3][:, -size // 2 :]
    assert not dots[: size // 2].any()  # it ends in dots, which stand low


def test_short_labels_are_not_touched() -> None:
    image = Image.new("RGB", (280, 10))
    cat, dots, cats = (with_caption(image, [text]).tobytes() for text in ("cat", "cat...", "cats"))
    assert len({cat, dots, cats}) == 3


@pytest.mark.parametrize(
    "label", ["größer ñ", "猫 犬", "نص عربي", "🐱", "Ελλάδα", "кошка", "", " ", "a\nb", "tab\there", "a\udcffb"]
)
def test_labels_in_any_script(label: str) -> None:
    captioned = with_caption(Image.new("RGB", (140, 20)), [label])
    assert captioned.size == (140, 20 + 11 + 2 * 3)
    assert inked(captioned.crop((0, 20, 140, captioned.height))).any() == bool(label.strip())


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
def test_captions_of_tiny_images(size: tuple[int, int]) -> None:
    captioned = with_caption(Image.new("RGB", size, "red"), ["a label that does not fit"])
    assert captioned.width == size[0]
    assert captioned.height > size[1] + 11
    assert captioned.crop((0, 0, *size)).getcolors() == [(size[0] * size[1], (255, 0, 0))]


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize(("size", "expected"), [((200, 100), (64, 32)), ((10, 40), (16, 64)), ((5000, 2), (64, 1))])
def test_fit_keeps_proportions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", size), 64).size == expected


@pytest.mark.parametrize(("columns", "across", "down"), [(3, 3, 3), (6, 6, 2), (10, 7, 1), (1, 1, 7)])
def test_contact_sheet(columns: int, across: int, down: int) -> None:
    cell, gap = 64, 8
    images = [Image.new("RGB", (50, 50), color) for color in COLORS]
    sheet = contact_sheet(images, [["x"]] * 7, [INK] * 7, columns=columns, cell=cell)
    height = cell + 11 + 2 * 3
    assert sheet.size == (across * (cell + gap) + gap, down * (height + gap) + gap)
    for number, color in enumerate(COLORS):
        left, top = gap + number % across * (cell + gap), gap + number // across * (height + gap)
        assert sheet.crop((left, top, left + cell, top + cell)).getcolors() == [(cell * cell, color)]
        assert inked(sheet.crop((left, top + cell, left + cell, top + height))).any()
        assert not inked(sheet.crop((left - gap, top, left, top + height))).any()


@pytest.mark.parametrize(("size", "shown"), [((200, 100), (64, 32)), ((10, 40), (16, 64)), ((1000, 1), (64, 1))])
def test_images_are_fitted_into_their_cell(size: tuple[int, int], shown: tuple[int, int]) -> None:
    sheet = contact_sheet([Image.new("RGB", size, "red")], [[]], [INK], cell=64)
    pixels = np.asarray(sheet.crop((8, 8, 72, 72)))
    red = (pixels == (255, 0, 0)).all(axis=2)
    assert (extent(red.any(axis=0)), extent(red.any(axis=1))) == shown
    assert red.sum() == shown[0] * shown[1]
    rows, columns = np.nonzero(red)
    assert abs(rows.mean() - 31.5) <= 0.5  # in the middle
    assert abs(columns.mean() - 31.5) <= 0.5
    assert (pixels[~red] == 242).all()


def test_captions_of_different_length_and_none() -> None:
    images = [Image.new("RGB", (9, 9), color) for color in COLORS[:2]]
    sheet = contact_sheet(images, [["one"], ["one", "two", "three"]], [INK] * 2, cell=64)
    assert sheet.height == 8 + 64 + 3 * 14 + 3 + 8
    assert contact_sheet([], [], []).height > 0
    with pytest.raises(ValueError, match="shorter"):
        contact_sheet(images, [["one"]], [INK] * 2)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_save_image(tmp_path: Path, name: str, kind: str) -> None:
    image = Image.new("RGB", (30, 20), (10, 200, 30))
    assert save_image(image, str(tmp_path / "new" / name)) == tmp_path / "new" / name
    with Image.open(tmp_path / "new" / name) as saved:
        assert (saved.format, saved.size) == (kind, (30, 20))
        assert np.abs(np.asarray(saved.convert("RGB"), int) - (10, 200, 30)).max() <= 8


@pytest.mark.parametrize("name", ["a", "a.txt", ".png"])
def test_save_image_wants_a_images_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: not the name of an image; use a name that ends in .jpg or .png"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_image_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    path = save_image(Image.new("RGB", (3, 3), "red"), tmp_path / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"):
        save_image(Image.new("RGBA", (3, 3)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- colors ----------------------------------------------------------------------------------------------------------

GROUND = (17, 99, 201)
"""No mixture of a class's red with black or white."""
RED = (255, 0, 0)
HALO = (40, 40, 40)


def is_color(image: Image.Image, color: RGB) -> np.ndarray:
    return (np.asarray(image) == color).all(axis=2)


def luminance(color: RGB) -> float:
    """Of the web's definition of contrast."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(color) / 255)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def test_class_colors_are_distinct() -> None:
    colors = np.array(class_colors(150))
    assert colors.shape == (150, 3)
    assert colors.min() >= 0
    assert colors.max() <= 255
    apart = np.linalg.norm(colors[:, None].astype(float) - colors, axis=2) + 999 * np.eye(150)
    assert apart[:12, :12].min() > 60
    assert apart.min() >= 15
    assert len(set(class_colors(255))) == 255
    assert (colors.max(axis=1) - colors.min(axis=1)).min() >= 30  # no grays


@pytest.mark.parametrize("num_classes", [0, 1, 6, 7, 8, 21, 91, 149])
def test_more_classes_never_change_the_first_colors(num_classes: int) -> None:
    colors = class_colors(num_classes)
    assert colors == class_colors(150)[:num_classes]


def test_text_can_be_read_on_every_color() -> None:
    for color in [*class_colors(150), BLACK, WHITE, (118, 118, 118), (119, 119, 119)]:
        ink = text_color(color)
        assert ink in (BLACK, WHITE)
        dark, light = sorted([luminance(ink), luminance(color)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert (text_color(BLACK), text_color(WHITE)) == (WHITE, BLACK)


# -- boxes ------------------------------------------------------------------------------------------------------------


def plate_size(side: int, text: str) -> tuple[int, int]:
    """Height and width of the plate of a text that has room, in a square image."""
    image = Image.new("RGB", (side, side), GROUND)
    box = [[0, side // 2, side - 1, side - 1]]
    differs = (np.asarray(draw_boxes(image, box, [text], [RED])) != draw_boxes(image, box, [""], [RED])).any(axis=2)
    return extent(differs.any(axis=1)), extent(differs.any(axis=0))


def plate_places(image: Image.Image, size: tuple[int, int]) -> list[list[int]]:
    """Rows and columns where a plate of (height, width) can be: neither ground nor halo in it."""
    drawn = ~is_color(image, GROUND)
    top, left = (int(drawn.any(axis=axis).argmax()) for axis in (1, 0))
    bottom, right = top + extent(drawn.any(axis=1)), left + extent(drawn.any(axis=0))
    shut = ~is_color(image.crop((left, top, right, bottom)), HALO) & drawn[top:bottom, left:right]
    height, width = size
    if shut.shape[0] < height or shut.shape[1] < width:
        return []
    sums = np.pad(shut, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return [[top + int(row), left + int(column)] for row, column in np.argwhere(inside == height * width)]


def test_frames_have_the_color_and_nothing_else_changes() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(60, 200, (150, 200, 3), np.uint8))
    before = image.tobytes()
    drawn = np.asarray(draw_boxes(image, [[40, 50, 120, 110]], [""], [RED]))
    frame, halo = np.zeros((150, 200), bool), np.zeros((150, 200), bool)
    frame[50:111, 40:121] = True
    halo[49:112, 39:122] = True
    halo &= ~frame
    frame[52:109, 42:119] = False
    assert (drawn[frame] == RED).all()
    assert (drawn[halo] == HALO).all()
    rest = ~frame & ~halo
    assert np.array_equal(drawn[rest], np.asarray(image)[rest])
    assert image.tobytes() == before


@pytest.mark.parametrize(("side", "thick"), [(64, 2), (600, 2), (900, 3), (3000, 10)])
def test_lines_and_type_follow_the_image(side: int, thick: int) -> None:
    image = Image.new("RGB", (side, side), GROUND)
    drawn = is_color(draw_boxes(image, [[side / 4, side / 2, 3 * side / 4, side - 10]], [""], [RED]), RED)
    across = drawn[3 * side // 4]
    assert across[: side // 2].sum() == across[side // 2 :].sum() == thick
    height, width = plate_size(side, "cat")
    assert height == round(1.3 * max(12, round(side / 42)))
    assert height < width < side


@pytest.mark.parametrize("side", [64, 400, 3000])
def test_plates_stay_inside_the_image(side: int) -> None:
    text = "cat"
    size = plate_size(side, text)
    last, far, middle, wide = side - 1, side + 30, side / 2, side / 4
    places = {
        "top": (middle, 0, middle + wide, wide),
        "above the top": (middle, -20, middle + wide, wide),
        "left": (0, middle, wide, middle + wide),
        "right": (last - 3, middle, last, middle + wide),
        "right of it": (last - 3, middle, far, middle + wide),
        "bottom": (middle, last - 3, middle + wide, last),
        "below the bottom": (middle, last - 3, middle + wide, far),
        "corner": (last - 2, 0, last, 2),
        "all": (-20, -20, far, far),
        "outside": (far, far, far + 20, far + 20),
    }
    if side == 3000:  # which takes its time
        places = {name: places[name] for name in ("top", "right of it", "corner")}
    image = Image.new("RGB", (side, side), GROUND)
    for name, box in places.items():
        drawn = draw_boxes(image, [box], [text], [RED])
        assert drawn.size == image.size
        assert plate_places(drawn, size), name
    assert not plate_places(draw_boxes(image, [places["corner"]], [""], [RED]), size)
    if side > 64:
        drawn = draw_boxes(image, [(wide, middle, side - wide, side - wide)], [text], [RED])
        assert plate_places(drawn, size)[0] == [middle - size[0], wide]  # above the box where there is room


def test_the_first_boxes_lie_on_top() -> None:
    image = Image.new("RGB", (100, 100), GROUND)
    for colors in ([RED, (0, 255, 0)], [(0, 255, 0), RED]):
        drawn = draw_boxes(image, [(10, 10, 60, 60), (10, 10, 60, 60)], ["", ""], colors)
        assert drawn.getpixel((10, 30)) == colors[0]
        assert not is_color(drawn, colors[1]).any()


def test_plates_make_way_for_each_other() -> None:
    image = Image.new("RGB", (400, 400), GROUND)
    boxes = [(100 + n, 100 + n, 300 + n, 300 + n) for n in range(4)]
    colors = [RED, (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    frames, drawn = (draw_boxes(image, boxes, [text] * 4, colors) for text in ("", "cat"))
    height, width = plate_size(400, "cat")
    for color in colors:  # but for letters and frames, the whole plate
        assert is_color(drawn, color).sum() - is_color(frames, color).sum() > 0.3 * height * width


def test_where_plates_must_hide_each_other_the_first_lies_on_top() -> None:
    image = Image.new("RGB", (90, 16), GROUND)  # as high as a plate
    for colors in ([RED, (0, 255, 0)], [(0, 255, 0), RED]):
        drawn = draw_boxes(image, [(0, 0, 89, 15)] * 2, ["a label that fills it from left to right"] * 2, colors)
        first, last = (is_color(drawn, color).sum() for color in colors)
        assert first > 5 * last


def test_long_texts_are_shortened_to_the_image() -> None:
    image = Image.new("RGB", (120, 90), GROUND)
    drawn = draw_boxes(image, [(5, 40, 60, 80)], ["a text that is longer than the image is wide"], [RED])
    assert drawn.size == image.size
    assert is_color(drawn, RED).any(axis=0).sum() > 100


@pytest.mark.parametrize("side", [1, 9, 64, 3000])
@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4), np.float32)])
def test_no_boxes_no_change(side: int, boxes: np.ndarray) -> None:
    image = Image.new("RGB", (side, side), GROUND)
    for drawn in (draw_boxes(image, boxes, [], []), draw_outlines(image, boxes)):
        assert drawn is not image
        assert drawn.tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (300, 8), (8, 300)])
def test_boxes_on_tiny_images(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, GROUND)
    drawn = draw_boxes(image, [(0, 0, *size), (0, 0, 0, 0)], ["cat 99%", "größer 猫"], [RED, (0, 255, 0)])
    assert drawn.size == draw_outlines(image, [(0, 0, *size), (0, 0, 0, 0)]).size == size


def test_each_box_has_a_text_and_a_color() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_boxes(Image.new("RGB", (9, 9)), [(1, 1, 5, 5)], [], [RED])


@pytest.mark.parametrize(("side", "thick"), [(64, 1), (400, 1), (1200, 3)])
def test_outlines_are_dashed_in_black_and_white(side: int, thick: int) -> None:
    image = Image.new("RGB", (side, side), GROUND)
    low, high = side // 4, 3 * side // 4
    drawn = draw_outlines(image, [(low, low, high, high)])
    assert image.getcolors() == [(side * side, GROUND)]
    black, white = is_color(drawn, BLACK), is_color(drawn, WHITE)
    assert np.array_equal(black | white, ~is_color(drawn, GROUND))
    margin = thick // 2 + 1
    inside = slice(low + margin, high - margin + 1)
    assert not (black | white)[inside, inside].any()
    outside = black | white
    outside[low - margin : high + margin + 1, low - margin : high + margin + 1] = False
    assert not outside.any()
    for edge in ((low, inside), (high, inside), (inside, low), (inside, high)):
        assert (black | white)[edge].all()
        assert 0.3 < black[edge].mean() < 0.7
    across = (black | white)[side // 2]
    assert across.sum() == 2 * thick


# -- label maps -------------------------------------------------------------------------------------------------------

CLASSES = ["cat", "dog", "owl"]


def halves() -> np.ndarray:
    """Class 1 on the left; nothing on the right. Shape: (20, 40)."""
    label_map = np.full((20, 40), 255, np.uint8)
    label_map[:, :20] = 1
    return label_map


@pytest.mark.parametrize("opacity", [0, 0.3, 0.55, 1])
def test_label_maps_are_blended(opacity: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8))
    before = np.array(image)
    drawn = np.asarray(draw_label_map(image, halves(), CLASSES, opacity=opacity)).astype(int)
    assert np.array_equal(drawn[:, 20:], before[:, 20:])
    expected = before[:, :20] * (1 - opacity) + np.array(class_colors(3)[1]) * opacity
    assert np.abs(drawn[:, :20] - expected).max() <= 0.51
    assert np.array_equal(image, before)


def test_nothing_to_draw() -> None:
    image = Image.new("RGB", (40, 20), GROUND)
    drawn = draw_label_map(image, np.full((20, 40), 255, np.uint8), CLASSES)
    assert drawn.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["background", "__background__", "Background"])
def test_the_background_has_neither_color_nor_entry(name: str) -> None:
    image, label_map = Image.new("RGB", (40, 20), GROUND), np.zeros((20, 40), np.uint8)
    classes = [name, "dog", "background noise"]
    assert draw_label_map(image, label_map, classes).tobytes() == image.tobytes()
    label_map[:, :10], label_map[:, 10:15] = 1, 2
    drawn = draw_label_map(image, label_map, classes)
    assert np.array_equal(~is_color(drawn, GROUND), label_map != 0)
    assert background(classes) == [0]


def test_legend_takes_as_many_lines_as_it_needs() -> None:
    colors = class_colors(9)
    texts = {number: f"class {number}" for number in range(9)}
    heights = []
    for width in (120, 300, 900):
        image = Image.new("RGB", (width, 100), GROUND)
        drawn = with_legend(image, texts, 9)
        assert drawn.width == width
        assert drawn.crop((0, 0, width, 100)).tobytes() == image.tobytes()
        strip = drawn.crop((0, 100, width, drawn.height))
        squares = [np.argwhere(is_color(strip, color)) for color in colors]
        assert all(len(square) >= 10 * 10 for square in squares)
        corners = [tuple(square.min(axis=0)) for square in squares]
        assert corners == sorted(corners)  # line by line
        ink = inked(strip)
        assert not ink[-2:].any()
        assert not ink[:, :5].any()
        heights.append(strip.height)
    assert heights[0] > heights[1] > heights[2]


def test_legends_of_nothing_and_of_long_names() -> None:
    image = Image.new("RGB", (120, 60), GROUND)
    assert with_legend(image, {}, 2).tobytes() == image.tobytes()
    long = with_legend(image, {1: "giant schnauzer " * 20}, 2)
    short = with_legend(image, {1: "dog"}, 2)
    assert long.size == short.size
    assert not inked(long.crop((0, 60, 120, long.height)))[:, 118:].any()
