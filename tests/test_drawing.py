from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.drawing import contact_sheet, save_image, with_caption

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
def test_caption_size_follows_the_picture(width: int, height: int, type_size: int) -> None:
    picture = Image.new("RGB", (width, height), (10, 200, 30))
    captioned = with_caption(picture, ["HIT"])
    pad = type_size // 3
    assert captioned.size == (width, height + type_size + 2 * pad)
    assert captioned.crop((0, 0, width, height)).tobytes() == picture.tobytes()
    ink = inked(captioned.crop((0, height, width, captioned.height)))
    assert 0.6 * type_size <= extent(ink.any(axis=1)) <= 0.9 * type_size
    assert ink.any(axis=0)[:pad].sum() == 0
    assert not ink[0].any()
    assert not ink[-1].any()


def test_lines_stand_below_each_other() -> None:
    picture = Image.new("RGB", (280, 50), "navy")
    assert with_caption(picture, []).height == 50 + 6
    assert with_caption(picture, ["A", "B", "C"]).height == 50 + 3 * 26 + 6
    ink = inked(with_caption(picture, ["HHH", "", "HHH"]).crop((0, 50, 280, 134))).any(axis=1)
    assert [bool(ink[6 + 26 * row : 32 + 26 * row].any()) for row in range(3)] == [True, False, True]


def test_captions_have_the_colour_asked_for() -> None:
    strip = np.asarray(with_caption(Image.new("RGB", (280, 9)), ["HHHH"], colour=(190, 40, 30)))[9:]
    assert (strip == (190, 40, 30)).all(axis=2).any()
    assert not (strip == INK).all(axis=2).any()


@pytest.mark.parametrize("width", [40, 120, 300])
def test_long_labels_are_shortened_to_the_width(width: int) -> None:
    picture = Image.new("RGB", (width, 10), "white")
    size = max(11, width // 14)
    strips = [
        np.asarray(with_caption(picture, [text]))[10:] for text in ("giant schnauzer " * 20, "giant schnauzer " * 21)
    ]
    assert np.array_equal(*strips)
    ink = inked(Image.fromarray(strips[0])).any(axis=0)
    assert not ink[width - size // 3 + 1 :].any()
    assert ink[width // 2 :].any()
    dots = inked(Image.fromarray(strips[0]))[:, : width - size // 3][:, -size // 2 :]
    assert not dots[: size // 2].any()  # it ends in dots, which stand low


def test_short_labels_are_not_touched() -> None:
    picture = Image.new("RGB", (280, 10))
    cat, dots, cats = (with_caption(picture, [text]).tobytes() for text in ("cat", "cat...", "cats"))
    assert len({cat, dots, cats}) == 3


@pytest.mark.parametrize(
    "label", ["größer ñ", "猫 犬", "نص عربي", "🐱", "Ελλάδα", "кошка", "", " ", "a\nb", "tab\there", "a\udcffb"]
)
def test_labels_in_any_script(label: str) -> None:
    captioned = with_caption(Image.new("RGB", (140, 20)), [label])
    assert captioned.size == (140, 20 + 11 + 2 * 3)
    assert inked(captioned.crop((0, 20, 140, captioned.height))).any() == bool(label.strip())


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
def test_captions_of_tiny_pictures(size: tuple[int, int]) -> None:
    captioned = with_caption(Image.new("RGB", size, "red"), ["a label that does not fit"])
    assert captioned.width == size[0]
    assert captioned.height > size[1] + 11
    assert captioned.crop((0, 0, *size)).getcolors() == [(size[0] * size[1], (255, 0, 0))]


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize(("columns", "across", "down"), [(3, 3, 3), (6, 6, 2), (10, 7, 1), (1, 1, 7)])
def test_contact_sheet(columns: int, across: int, down: int) -> None:
    cell, gap = 64, 8
    images = [Image.new("RGB", (50, 50), colour) for colour in COLOURS]
    sheet = contact_sheet(images, [["x"]] * 7, [INK] * 7, columns=columns, cell=cell)
    height = cell + 11 + 2 * 3
    assert sheet.size == (across * (cell + gap) + gap, down * (height + gap) + gap)
    for number, colour in enumerate(COLOURS):
        left, top = gap + number % across * (cell + gap), gap + number // across * (height + gap)
        assert sheet.crop((left, top, left + cell, top + cell)).getcolors() == [(cell * cell, colour)]
        assert inked(sheet.crop((left, top + cell, left + cell, top + height))).any()
        assert not inked(sheet.crop((left - gap, top, left, top + height))).any()


@pytest.mark.parametrize(("size", "shown"), [((200, 100), (64, 32)), ((10, 40), (16, 64)), ((1000, 1), (64, 1))])
def test_pictures_are_fitted_into_their_cell(size: tuple[int, int], shown: tuple[int, int]) -> None:
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
    images = [Image.new("RGB", (9, 9), colour) for colour in COLOURS[:2]]
    sheet = contact_sheet(images, [["one"], ["one", "two", "three"]], [INK] * 2, cell=64)
    assert sheet.height == 8 + 64 + 3 * 14 + 3 + 8
    assert contact_sheet([], [], []).height > 0
    with pytest.raises(ValueError, match="shorter"):
        contact_sheet(images, [["one"]], [INK] * 2)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_save_image(tmp_path: Path, name: str, kind: str) -> None:
    picture = Image.new("RGB", (30, 20), (10, 200, 30))
    assert save_image(picture, str(tmp_path / "new" / name)) == tmp_path / "new" / name
    with Image.open(tmp_path / "new" / name) as saved:
        assert (saved.format, saved.size) == (kind, (30, 20))
        assert np.abs(np.asarray(saved.convert("RGB"), int) - (10, 200, 30)).max() <= 8


@pytest.mark.parametrize("name", ["a", "a.txt", ".png"])
def test_save_image_wants_a_pictures_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: not the name of a picture; end it in .jpg or .png"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    path = save_image(Image.new("RGB", (3, 3), "red"), tmp_path / "a.jpg")
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode RGBA as JPEG"):
        save_image(Image.new("RGBA", (3, 3)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
