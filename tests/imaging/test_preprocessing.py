import io
import json
import math
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from torchvision.transforms import InterpolationMode, v2

from mobilevit.data.shapes import render_scene
from mobilevit.devices import normalize
from mobilevit.errors import ImageError
from mobilevit.files import ReadError
from mobilevit.imaging import decode
from mobilevit.imaging.decode import MAX_PIXELS, find_images, open_image, read_image
from mobilevit.imaging.preprocessing import Preprocessing
from sample_images import encoded, noise_jpeg, smooth
from unprivileged import locked_folder

RED, GREEN, BLUE, YELLOW = (220, 20, 40), (30, 180, 60), (10, 40, 200), (230, 210, 30)


def quadrants(width: int, height: int) -> Image.Image:
    """Red, green / blue, yellow."""
    image = Image.new("RGB", (width, height))
    w, h = width // 2, height // 2
    for color, corner in ((RED, (0, 0)), (GREEN, (w, 0)), (BLUE, (0, h)), (YELLOW, (w, h))):
        image.paste(color, (*corner, width, height))
    return image


def difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def png(width: int, height: int, *, bits: int, color_type: int, rows: bytes) -> bytes:
    """A PNG by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


# -- read_image: kinds of files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "kind", "options", "tolerance"),
    [
        (".jpg", "JPEG", {"quality": 95, "subsampling": 0}, 6),
        (".jpg", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        (".png", "PNG", {}, 0),
        (".webp", "WEBP", {"lossless": True}, 0),
        (".bmp", "BMP", {}, 0),
        (".gif", "GIF", {}, 0),
        (".tif", "TIFF", {"compression": "tiff_lzw"}, 0),
        (".ppm", "PPM", {}, 0),
        (".jpg", "MPO", {"quality": 95, "subsampling": 0}, 6),
        (".avif", "AVIF", {"quality": 95, "subsampling": "4:4:4"}, 8),
        (".jpg", "PNG", {}, 0),  # the content counts, not the name
    ],
)
def test_formats(tmp_path: Path, suffix: str, kind: str, options: dict[str, Any], tolerance: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"image{suffix}"
    path.write_bytes(encoded(quadrants(32, 24), kind, **options))
    read = read_image(path)
    assert read.mode == "RGB"
    assert difference(read, quadrants(32, 24)) <= tolerance


def gray_levels() -> np.ndarray:
    return np.arange(0, 65536, 257 * 3, dtype=np.uint16)[:84].reshape(7, 12)  # high byte = low byte = 0, 3, 6 ...


MODES: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {
    # name: file, expected RGB (broadcast), tolerance
    "16-bit gray PNG": (
        lambda: encoded(Image.fromarray(gray_levels()), "PNG"),
        (gray_levels() >> 8)[..., None],
        0,
    ),
    "16-bit gray TIFF": (
        lambda: encoded(Image.fromarray(gray_levels()), "TIFF"),
        (gray_levels() >> 8)[..., None],
        0,
    ),
    "16-bit RGB PNG": (
        lambda: png(
            2, 1, bits=16, color_type=2, rows=b"\0" + struct.pack(">6H", 0xABCD, 0x12FF, 0, 65535, 0x80, 0x8000)
        ),
        np.array([[(0xAB, 0x12, 0), (255, 0, 0x80)]]),
        0,
    ),
    "32-bit integer TIFF": (
        lambda: encoded(Image.fromarray(np.array([[0, 0x1234, 65535, 70000, -5]], np.int32)), "TIFF"),
        np.array([0, 0x12, 255, 255, 0])[None, :, None],
        0,
    ),
    "float TIFF in 0..1": (
        lambda: encoded(Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)), "TIFF"),
        np.array([0, 63, 127, 255])[None, :, None],
        0,
    ),
    "float TIFF in 0..255": (
        lambda: encoded(Image.fromarray(np.array([[-3, 17, 200, 300, math.nan]], np.float32)), "TIFF"),
        np.array([0, 17, 200, 255, 0])[None, :, None],
        0,
    ),
    "1-bit PNG": (
        lambda: encoded(Image.fromarray(np.array([[True, False, True]])), "PNG"),
        np.array([255, 0, 255])[None, :, None],
        0,
    ),
    "gray JPEG": (lambda: encoded(Image.new("L", (9, 5), 77), "JPEG"), np.full((5, 9, 1), 77), 1),
    "CMYK JPEG": (
        lambda: encoded(quadrants(32, 24).convert("CMYK"), "JPEG", quality=98, subsampling=0),
        np.asarray(quadrants(32, 24)),
        8,
    ),
    "palette PNG": (
        lambda: encoded(quadrants(8, 6).quantize(4), "PNG"),
        np.asarray(quadrants(8, 6)),
        0,
    ),
    "LA PNG": (
        lambda: encoded(Image.fromarray(np.array([[(0, 0), (0, 51), (100, 255)]], np.uint8), "LA"), "PNG"),
        np.array([255, 204, 100])[None, :, None],
        0,
    ),
    "RGBA PNG": (
        lambda: encoded(
            Image.fromarray(np.array([[(9, 9, 9, 0), (255, 0, 0, 51), (1, 2, 3, 255)]], np.uint8), "RGBA"), "PNG"
        ),
        np.array([[(255, 255, 255), (255, 204, 204), (1, 2, 3)]]),
        0,
    ),
    "RGB PNG with a transparent color": (
        lambda: encoded(quadrants(8, 6), "PNG", transparency=RED),
        np.where(np.asarray(quadrants(8, 6)) == RED, 255, np.asarray(quadrants(8, 6))),
        0,
    ),
}


@pytest.mark.parametrize("kind", list(MODES))
def test_color_modes(kind: str) -> None:
    make, expected, tolerance = MODES[kind]
    read = read_image(make())
    assert read.mode == "RGB"
    pixels = np.asarray(read, int)
    assert np.abs(pixels - np.broadcast_to(expected, pixels.shape)).max() <= tolerance
    assert pixels.shape[:2] == expected.shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(kind: str) -> None:
    image = quadrants(8, 6).quantize(4)
    (transparent,) = {image.getpixel((0, 0))}
    read = read_image(encoded(image, kind, transparency=transparent))
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert [read.getpixel(p) for p in ((7, 0), (0, 5), (7, 5))] == [GREEN, BLUE, YELLOW]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_animations(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    read = read_image(data)
    assert difference(read, frames[0]) <= 1
    assert read.size == (16, 16)


# Where row 0 and column 0 of the stored image lie when it is looked at (EXIF 2.3, tag 0x0112).
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("JPEG", 6), ("WEBP", 0)])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientations_all_give_the_upright_image(orientation: int, kind: str, tolerance: int) -> None:
    upright = quadrants(48, 32)
    first_row, first_column = ORIENTATIONS[orientation]
    pixels = np.asarray(upright)
    if first_row in ("left", "right"):
        pixels = pixels.swapaxes(0, 1)
    if first_row in ("bottom", "right"):
        pixels = pixels[::-1]
    if first_column in ("bottom", "right"):
        pixels = pixels[:, ::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    data = encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif, **options)
    assert difference(read_image(data), upright) <= tolerance


@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0", b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01"])
def test_broken_exif_does_not_cost_the_image(exif: bytes) -> None:
    assert (
        difference(
            read_image(encoded(quadrants(32, 32), "JPEG", exif=exif, subsampling=0, quality=95)), quadrants(32, 32)
        )
        <= 6
    )


# -- read_image: what cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("reduction", "factor"), [(1.0, 1), (1.99, 1), (2.0, 2), (3.9, 2), (4.5, 4), (100.0, 8)])
def test_jpegs_can_be_decoded_smaller(reduction: float, factor: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(400, 240), "JPEG", quality=95, exif=exif.tobytes())
    whole, opened = read_image(data), open_image(data)
    assert opened.size == whole.size == ((400, 240) if orientation == 1 else (240, 400))
    image = opened.decode(reduction)
    assert image.size == (whole.width // factor, whole.height // factor)
    assert difference(image, whole.resize(image.size, Image.Resampling.BOX)) <= 4


def test_other_formats_are_decoded_whole() -> None:
    assert open_image(encoded(smooth(64, 48), "PNG")).decode(8.0).size == (64, 48)
    assert open_image(np.zeros((48, 64, 3), np.uint8)).decode(8.0).size == (64, 48)


def test_a_header_alone_tells_nothing_of_damage_behind_it() -> None:
    opened = open_image(noise_jpeg()[:1500], "short.jpg")
    with pytest.raises(ImageError, match=r"short\.jpg"):
        opened.decode(4.0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text\n" * 20, "not an image in a known format (JPEG, "),
        (noise_jpeg()[:4000], "cannot be read (image file is truncated"),
        (encoded(smooth(90, 90), "PNG")[:2000], "cannot be read ("),
        (encoded(smooth(90, 90), "GIF")[:2000], "cannot be read ("),
        (encoded(smooth(90, 90), "WEBP")[:1000], ""),
        (noise_jpeg()[:2], ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "not an image in a known format",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a known format"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"^{re.escape(f'{path}: {reason}')}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"^row 7: "):
        read_image(data, "row 7")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.png: no such file$"):
        read_image(str(tmp_path / "nothing.png"))
    with pytest.raises(ImageError, match=rf"^{re.escape(str(tmp_path))}: cannot be read \(Is a directory\)$"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a line of\0 bytes")
    with locked_folder() as folder:
        with pytest.raises(ImageError, match=r"inside\.txt: cannot be read \(Permission denied\)$"):
            read_image(folder / "inside.txt")
        with pytest.raises(ReadError, match=r"locked: cannot be read \(Permission denied\)$"):
            find_images(folder.parent)


def test_a_bug_of_ours_is_not_taken_for_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a bug")

    for name in ("_to_8_bits", "_has_too_many_scans"):
        with monkeypatch.context() as patch:
            patch.setattr(decode, name, broken)
            with pytest.raises(TypeError, match="a bug"):
                read_image(noise_jpeg())


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (15000, 12000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_go_off(width: int, height: int) -> None:
    data = png(width, height, bits=8, color_type=2, rows=b"\0" * 100)
    started = time.perf_counter()
    with pytest.raises(ImageError, match=f"^bomb.png: .*pixels.* the limit of {MAX_PIXELS}$"):
        read_image(data, "bomb.png")
    assert time.perf_counter() - started < 0.5


def test_a_small_jpeg_cannot_keep_the_decoder_busy_for_hours() -> None:
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(buffer, "JPEG", progressive=True)
    data, end = buffer.getvalue(), buffer.getvalue().rindex(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda") : end]
    started = time.perf_counter()
    with pytest.raises(ImageError, match=r"^bomb\.jpg: more than the limit of 100 scans"):
        read_image(data[:end] + 300 * scan + data[end:], "bomb.jpg")
    assert time.perf_counter() - started < 0.5
    # The same bytes within a profile, or behind the image as in photographs with a film, are no scans.
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", icc_profile=1000 * b"\xff\xda")
    assert read_image(buffer.getvalue() + 1000 * b"\xff\xda\x00\x02").size == (40, 30)


@pytest.mark.filterwarnings("error")
def test_below_the_limit_there_is_no_word_of_bombs() -> None:
    data = png(12000, 8000, bits=8, color_type=0, rows=b"\0" * 100)  # Pillow warns above half the limit
    with pytest.raises(ImageError, match=r"^cut\.png: cannot be read \(image file is truncated"):
        read_image(data, "cut.png")


# -- read_image: other sources ----------------------------------------------------------------------------------------


def test_sources_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    quadrants(20, 10).save(path)
    with Image.open(path) as opened:
        sources = [str(path), path, path.read_bytes(), opened, quadrants(20, 10), np.asarray(quadrants(20, 10))]
        assert [difference(read_image(source), quadrants(20, 10)) for source in sources] == [0] * 6


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(
        ImageError, match=rf"^frame 3: array is {array.dtype} {re.escape(str(array.shape))}; an image is"
    ):
        read_image(array, "frame 3")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "LA", "PA", "RGBA"])
def test_pil_images_of_any_mode(mode: str) -> None:
    read = read_image(Image.new(mode, (5, 4)))
    assert (read.mode, read.size) == ("RGB", (5, 4))
    assert read.getcolors() is not None
    assert len(read.getcolors()) == 1


def test_pil_image_that_is_not_decoded_yet_and_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(noise_jpeg()[:4000])
    with (
        Image.open(path) as opened,
        pytest.raises(ImageError, match=r"^image 2: cannot be read \(image file is trunc"),
    ):
        read_image(opened, "image 2")
    with pytest.raises(ImageError, match="image: 0 x 5 pixels"):
        read_image(Image.new("RGB", (0, 5)))


# -- Preprocessing ----------------------------------------------------------------------------------------------------


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Colors at the corners in reading order."""
    return [tuple(pixels[y, x].tolist()) for y in (0, -1) for x in (0, -1)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_crop_keeps_exactly_the_middle(interpolation: Any) -> None:
    image = Image.new("RGB", (128, 96))
    middle = smooth(32, 32)
    image.paste(middle, (48, 32))
    preprocessing = Preprocessing(size=(32, 32), crop_fraction=1 / 3, interpolation=interpolation)
    pixels = preprocessing.resize(image)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(middle))


@pytest.mark.parametrize(
    ("size", "original", "kept"),  # sizes (height, width); kept (left, top, right, bottom)
    [
        ((32, 32), (100, 160), (30, 0, 130, 100)),
        ((32, 32), (160, 100), (0, 30, 100, 130)),
        ((32, 64), (50, 200), (50, 0, 150, 50)),
        ((32, 64), (200, 100), (0, 75, 100, 125)),
        ((64, 32), (100, 100), (25, 0, 75, 100)),
        ((64, 48), (16, 12), (0, 0, 12, 16)),  # small images grow
    ],
)
def test_crop_has_the_shape_of_the_size(
    size: tuple[int, int], original: tuple[int, int], kept: tuple[int, int, int, int]
) -> None:
    height, width = original
    image = Image.new("RGB", (width, height), "black")
    left, top, right, bottom = kept
    image.paste(quadrants(right - left, bottom - top), (left, top))
    pixels = Preprocessing(size=size, crop_fraction=1, interpolation="nearest").resize(image)
    assert pixels.shape == (*size, 3)
    assert np.array_equal(pixels, np.array(quadrants(size[1], size[0])))


def test_crop_fraction_leaves_the_border_out() -> None:
    image = Image.new("RGB", (100, 100), "black")
    image.paste("white", (10, 10, 90, 90))
    for fraction, darkest in ((0.8, 255), (0.9, 0)):
        pixels = Preprocessing(size=(40, 40), crop_fraction=fraction, interpolation="nearest").resize(image)
        assert pixels.min() == darkest
        assert pixels[20, 20].tolist() == [255, 255, 255]


def test_stretch_shows_the_whole_image() -> None:
    pixels = Preprocessing(size=(32, 48), resize_mode="stretch", interpolation="nearest").resize(quadrants(200, 40))
    assert np.array_equal(pixels, np.array(quadrants(48, 32)))
    cropped = Preprocessing(size=(32, 48), crop_fraction=1).resize(Image.new("RGB", (200, 40), RED))
    assert corners(cropped) == [RED] * 4


def test_shrinking_antialiases() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        pixels = Preprocessing(size=(32, 32), crop_fraction=1, interpolation=interpolation).resize(
            Image.fromarray(stripes)
        )
        assert np.abs(pixels.astype(int) - 127).max() <= 3


@settings(max_examples=60, deadline=None)
@given(
    image=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    size=st.tuples(st.integers(32, 90), st.integers(32, 90)),
    fraction=st.floats(0.01, 1),
    mode=st.sampled_from(["crop", "stretch"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
)
def test_any_image_to_any_size(
    image: tuple[int, int], size: tuple[int, int], fraction: float, mode: Any, interpolation: Any
) -> None:
    preprocessing = Preprocessing(size=size, crop_fraction=fraction, resize_mode=mode, interpolation=interpolation)
    pixels = preprocessing.resize(Image.new("RGB", image, YELLOW))
    assert (pixels.shape, pixels.dtype) == ((*size, 3), np.uint8)
    assert (pixels == np.array(YELLOW, np.uint8)).all()


@pytest.mark.parametrize("image", [(1, 20000), (20000, 1), (4032, 3024)])
def test_extreme_images(image: tuple[int, int]) -> None:
    pixels = Preprocessing().resize(Image.new("RGB", image, GREEN))
    assert pixels.shape == (256, 256, 3)
    assert corners(pixels) == [GREEN] * 4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"size": (31, 256)}, r"image size \(31, 256\) is too small; both sides must be 32"),
        ({"size": (256, 31)}, "too small"),
        ({"size": (256,)}, "too small"),
        ({"crop_fraction": 0.0}, "`crop_fraction` is 0.0; it must be above 0 and at most 1"),
        ({"crop_fraction": 1.01}, "`crop_fraction` is 1.01"),
        ({"crop_fraction": math.nan}, "`crop_fraction` is nan"),
        ({"resize_mode": "squash"}, "`resize_mode` is 'squash'; it can be 'crop', 'stretch' or 'pad'"),
        ({"interpolation": "area"}, "`interpolation` is 'area'; choose from nearest, bilinear, bicubic, lanczos"),
        ({"std": (1.0, 0.0, 1.0)}, "std all above 0"),
        ({"mean": (0.5,)}, "both have three numbers"),
    ],
)
def test_meaningless_values_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Preprocessing(**values)


def test_smallest_size_works() -> None:
    assert Preprocessing(size=(32, 32)).resize(quadrants(50, 50)).shape == (32, 32, 3)


def test_defaults_are_the_papers() -> None:
    default = Preprocessing()
    assert (default.size, default.crop_fraction, default.interpolation) == ((256, 256), 256 / 288, "bicubic")
    pixels = np.arange(256, dtype=np.uint8)[None, None, :, None].repeat(3, axis=3)
    assert np.array_equal(default.normalize(pixels)[0, 1, 0], np.arange(256, dtype=np.float32) / 255)


def test_normalize_by_hand() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    x = Preprocessing(mean=mean, std=std).normalize(pixels)
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert (x.dtype, x.flags.c_contiguous) == (np.float32, True)
    assert np.allclose(x, expected, rtol=1e-6, atol=1e-6)


def test_only_mean_or_only_std() -> None:
    white = np.full((1, 1, 1, 3), 255, np.uint8)
    assert Preprocessing(mean=(0.5, 0.0, 1.0)).normalize(white).flatten().tolist() == [0.5, 1.0, 0.0]
    assert Preprocessing(std=(0.5, 1.0, 2.0)).normalize(white).flatten().tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("scaled", [False, True])
def test_tensors_are_normalized_as_arrays_are_and_stay_channels_last(scaled: bool) -> None:
    preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7)) if scaled else Preprocessing()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    x = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), preprocessing)
    assert np.array_equal(x.numpy(), preprocessing.normalize(pixels))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(
            size=(192, 320), resize_mode="stretch", crop_fraction=0.9, interpolation="bilinear",
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        ),
    ],
)  # fmt: skip
def test_dict_round_trip_through_json(preprocessing: Preprocessing) -> None:
    values = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(values) == preprocessing
    assert set(values) == {"size", "resize_mode", "crop_fraction", "interpolation", "mean", "std"}


# -- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (640, 480), (333, 517)])
def test_agrees_with_torchvision(size: tuple[int, int]) -> None:
    image = smooth(*size)
    theirs = v2.Compose([v2.Resize(288, InterpolationMode.BICUBIC), v2.CenterCrop(256), v2.PILToTensor()])(image)
    gap = np.abs(Preprocessing().resize(image).astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))
    assert gap.max() <= 4
    assert gap.mean() < 1


def test_agrees_with_timm() -> None:
    timm_data = pytest.importorskip("timm.data")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = timm_data.create_transform(
        (3, 256, 256), is_training=False, interpolation="bicubic", crop_pct=0.9, mean=mean, std=std
    )
    preprocessing = Preprocessing(size=(256, 256), crop_fraction=0.9, mean=mean, std=std)
    for image in (smooth(500, 375), render_scene(2, size=360).image):
        gap = np.abs(preprocessing.normalize(preprocessing.resize(image)[None])[0] - transform(image).numpy())
        assert gap.mean() < 0.01  # of a range of about 4.5; timm cuts 284.4 pixels to 284
