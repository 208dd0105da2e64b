"""Built-in data: drawn scenes of simple shapes, for `mobilevit demo` and for tests.

A scene is described in units of the image's side, so that it can be drawn at any size. Every shape is a signed
distance (negative inside, zero on the edge), which gives its smooth edge, its shadow and its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, cos, floor, hypot, pi, sin, tau
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.files import Json, write_json, write_text
from mobilevit.progress import Progress

Array = NDArray[np.floating[Any]]


def _star(x: Array, y: Array, points: int, notch: float) -> Array:
    """Signed distance to a star with its tips at radius 1 and its notches at radius `notch`."""
    wedge = pi / points  # between a tip and the next notch; all edges are that of one wedge, mirrored and turned
    angle = np.abs((np.arctan2(y, x) + wedge) % (2 * wedge) - wedge)
    radius = np.hypot(x, y)
    x, y = radius * np.cos(angle) - 1, radius * np.sin(angle)  # from the tip
    edge_x, edge_y = notch * cos(wedge) - 1, notch * sin(wedge)  # from the tip to the notch
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    return np.copysign(np.hypot(x - along * edge_x, y - along * edge_y), x * edge_y - y * edge_x)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    x, y = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


# Signed distances on coordinates in which the shape just fits the circle of radius 1.
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "cross": lambda x, y: _box(np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y)), 0.95, 0.31),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.78) - 0.22,
    "square": lambda x, y: _box(x, y, 0.5**0.5, 0.5**0.5),
    "star": lambda x, y: _star(x, y, 5, 0.45),
    "triangle": lambda x, y: _star(x, y, 3, 0.5),  # a notch at cos(60 degrees) is no notch at all
}

CLASSES: tuple[str, ...] = tuple(_SHAPES)

_TEXTURES = ("solid", "stripes", "checker", "dots", "gradient")
_SCALE = (0.3, 0.8)  # diameter of the circle around a shape, when it is alone
_APART = 0.85  # least distance of two centers, over the sum of their radii
_LIGHT_X, _LIGHT_Y = -0.10, -0.14  # brightening per radius rightwards and downwards: the lamp is at the top left
_GRAIN = 128  # side of the noise that becomes the film grain of an image of any size


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn image with its labels for all three tasks."""

    image: Image.Image
    labels: tuple[int, ...]
    """Index in `CLASSES` of each object, the frontmost first."""
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]
    """Corners in pixels, tight around the visible part of each object, in the order of `labels`."""
    mask: NDArray[np.uint8]
    """(H, W): 0 for background, 1 + class elsewhere."""


def render_scene(index: int, *, seed: int = 0, size: int = 64, num_objects: int = 1) -> Scene:
    """Draw one scene; the same arguments always give the same scene, and another `size` the same scene enlarged.

    The first object is of class `index % len(CLASSES)`, the others of any. A single object lies wholly inside the
    image. Several, up to 8, are smaller and may be cut by the border, by a fifth of their radius at most; their centers
    are at least 0.85 times the sum of their radii apart, so that one hides a third of another at most. Place, size,
    rotation, texture and color do not depend on the class; objects are always lighter than the background.

    `size` is the side in pixels, at least 32 and at least 8 * num_objects; each `seed` is another series of scenes.
    """
    rng = np.random.default_rng((seed, index))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size

    ground = rng.uniform(0.28, 0.5)  # lightness of the lightest part of the background
    canvas = _background(rng, axis, ground)
    for _ in range(rng.integers(3, 8)):
        _draw_clutter(rng, axis, canvas)

    labels = [index % len(CLASSES), *rng.integers(len(CLASSES), size=num_objects - 1).tolist()]
    places = _place(rng, num_objects)
    owner = np.zeros((size, size), np.uint8)  # 1 + the object that shows at each pixel
    for i in reversed(range(num_objects)):
        _draw_object(rng, axis, canvas, ground, owner, CLASSES[labels[i]], places[i], i + 1)

    canvas += rng.uniform(0.006, 0.028) * _resize(rng.standard_normal((_GRAIN, _GRAIN), np.float32), size)[..., None]
    return Scene(
        image=Image.fromarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)),
        labels=tuple(labels),
        boxes_xyxy=tuple(_extent(owner == i + 1) for i in range(num_objects)),
        mask=np.array([0, *(1 + label for label in labels)], np.uint8)[owner],
    )


def write_folder(folder: Path, *, num_images: int, seed: int = 0, size: int = 64) -> None:
    """Write the first scenes of a series, one object each, as `folder/<class>/<index>.png`."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, scene in _scenes(num_images, seed, size, most_objects=1):
        scene.image.save(folder / CLASSES[scene.labels[0]] / name)


def write_boxes(folder: Path, *, num_images: int, seed: int = 0, size: int = 128) -> None:
    """Write the first scenes of a series, one to three objects each, as COCO: `images/` and `annotations.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[Json] = []
    objects: list[Json] = []
    for name, scene in _scenes(num_images, seed, size, most_objects=3):
        scene.image.save(folder / "images" / name)
        for label, (left, top, right, bottom) in zip(scene.labels, scene.boxes_xyxy, strict=True):
            box = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            ids = {"id": len(objects) + 1, "image_id": len(images), "category_id": 1 + label, "iscrowd": 0}
            objects.append(ids | box)
        images.append({"id": len(images), "file_name": name, "width": size, "height": size})
    categories = [{"id": 1 + label, "name": name} for label, name in enumerate(CLASSES)]
    write_json(folder / "annotations.json", {"images": images, "annotations": objects, "categories": categories})


def write_masks(folder: Path, *, num_images: int, seed: int = 0, size: int = 128) -> None:
    """Write the first scenes of a series, one to three objects each, as `images/`, `masks/` and `classes.txt`."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_text(folder / "classes.txt", "\n".join(("background", *CLASSES)) + "\n")
    for name, scene in _scenes(num_images, seed, size, most_objects=3):
        scene.image.save(folder / "images" / name)
        Image.fromarray(scene.mask).save(folder / "masks" / name)


def _scenes(num_images: int, seed: int, size: int, most_objects: int) -> Iterator[tuple[str, Scene]]:
    """Draw scenes in turn, each with the name of its file."""
    with Progress("draw", num_images) as progress:
        for index in range(num_images):
            # In steps of its own, so that each class comes first in scenes of every number of objects.
            num_objects = 1 + index // len(CLASSES) % most_objects
            yield f"{index:05d}.png", render_scene(index, seed=seed, size=size, num_objects=num_objects)
            progress.advance(1)


def _place(rng: np.random.Generator, num_objects: int) -> list[tuple[float, float, float]]:
    """Draw center and radius of each object, by the rule that `render_scene` states."""
    shrink = min(1, 1.3 / num_objects**0.5)
    inset = 1 if num_objects == 1 else 0.8
    places: list[tuple[float, float, float]] = []
    while len(places) < num_objects:
        radius = rng.uniform(*_SCALE) / 2 * shrink
        x, y = rng.uniform(inset * radius, 1 - inset * radius, 2).tolist()
        if all(hypot(x - x2, y - y2) >= _APART * (radius + radius2) for x2, y2, radius2 in places):
            places.append((x, y, radius))
        else:
            shrink *= 0.98  # so that it ends even if the image is full
    return places


def _background(rng: np.random.Generator, axis: Array, lightness: float) -> Array:
    """Blend two related colors along a line or in soft clouds. Shape: (H, W, 3)."""
    steps = np.array([0, 1])
    lightnesses = lightness - rng.uniform(0, 0.12) * steps
    first, second = _colors(lightnesses, rng.uniform(0.02, 0.09), rng.uniform(0, tau) + rng.uniform(-1.2, 1.2) * steps)
    angle = rng.uniform(0, tau)
    blend = 0.5 + cos(angle) * (axis - 0.5) + sin(angle) * (axis[:, None] - 0.5)
    cells = int(rng.integers(3, 9))
    clouds = _resize(rng.standard_normal((cells, cells), np.float32), len(axis))
    blend = np.clip(blend + rng.uniform(0.1, 0.5) * clouds, 0, 1)[..., None]
    canvas: Array = first + blend * (second - first)
    return canvas


def _draw_clutter(rng: np.random.Generator, axis: Array, canvas: Array) -> None:
    """Paint a dot, a straight stroke or a bent one; never a closed curve, never as large as an object."""
    length = rng.uniform(0.06, 0.24) if rng.random() < 0.7 else 0.0
    half_width = rng.uniform(0.006, 0.013) if length else rng.uniform(0.012, 0.026)
    half_angle = max(rng.uniform(-0.8, 1.2), 0.02)  # two in five are as good as straight
    radius = length / (2 * half_angle)
    center_x, center_y, angle = rng.uniform((0, 0, 0), (1, 1, tau)).tolist()
    window, x, y = _local(axis, center_x, center_y, length / 2 + half_width, angle)
    x, y = np.abs(x), y + radius  # an arc of a circle around the origin, half of it on each side of the y axis
    end_x, end_y = sin(half_angle), cos(half_angle)
    beyond = end_y * x > end_x * y
    from_end = np.hypot(x - radius * end_x, y - radius * end_y)
    distance = np.where(beyond, from_end, np.abs(np.hypot(x, y) - radius)) - half_width
    (color,) = _colors(rng.uniform(0.2, 0.95, 1), rng.uniform(0, 0.2), rng.uniform(0, tau, 1))
    _paint(canvas[window], color, rng.uniform(0.2, 0.5) * _coverage(distance, len(axis)))


def _draw_object(
    rng: np.random.Generator,
    axis: Array,
    canvas: Array,
    ground: float,
    owner: NDArray[np.uint8],
    shape: str,
    place: tuple[float, float, float],
    number: int,
) -> None:
    """Paint one object with its shadow onto `canvas`, and its `number` onto `owner`."""
    center_x, center_y, radius = place
    angle = rng.uniform(0, tau)
    window, x, y = _local(axis, center_x, center_y, 1.3 * radius, angle)
    x, y = x / radius, y / radius
    distance = _SHAPES[shape](x, y) * radius
    size = len(axis)

    # Lighter than any background by a clear step; the second color of a texture differs in hue more than in lightness.
    steps = np.array([0, 1])
    lightness = np.minimum(rng.uniform(ground + 0.3, 0.93) + rng.uniform(-0.1, 0.1) * steps, 0.96)
    first, second = _colors(lightness, rng.uniform(0.08, 0.2, 2), rng.uniform(0, tau) + rng.uniform(1, 5) * steps)
    blend = _texture(rng, x, y, radius * size)
    light_x, light_y = cos(angle) * _LIGHT_X + sin(angle) * _LIGHT_Y, cos(angle) * _LIGHT_Y - sin(angle) * _LIGHT_X
    light = light_x * x + light_y * y
    color = first + blend[..., None] * (second - first) + light[..., None]

    shadow = (0.25 - light) * np.exp(np.maximum(distance, 0) / (-0.12 * radius))
    canvas[window] *= 1 - shadow[..., None]
    _paint(canvas[window], color, _coverage(distance, size))
    owner[window][distance < 0] = number


def _texture(rng: np.random.Generator, x: Array, y: Array, radius_px: float) -> Array:
    """Draw the share of an object's second color at each point. Shape: (h, w) -> (h, w)."""
    kind = _TEXTURES[rng.integers(len(_TEXTURES))]
    period, shift_x, shift_y = rng.uniform(0.45, 0.8), rng.uniform(), rng.uniform()
    if kind == "solid":
        return np.zeros_like(x)
    if kind == "gradient":
        return _coverage(0.6 * x, 1)  # one edge, as soft as the object is wide
    x, y = _turn(x, y, rng.uniform(0, tau))  # the texture must not depend on how the shape is turned
    # Distance from the nearest line of a lattice, at most half a period.
    x = period * np.abs((x / period + shift_x) % 1 - 0.5)
    y = period * np.abs((y / period + shift_y) % 1 - 0.5)
    if kind == "dots":
        return _coverage(np.hypot(x, y) - 0.3 * period, radius_px)
    across = _coverage(x - period / 4, radius_px)
    if kind == "stripes":
        return across
    down = _coverage(y - period / 4, radius_px)
    checker: Array = across + down - 2 * across * down
    return checker


def _local(
    axis: Array, center_x: float, center_y: float, reach: float, angle: float
) -> tuple[tuple[slice, slice], Array, Array]:
    """Return the pixels within `reach` of a center, and their coordinates in a frame moved there and turned."""
    size, margin = len(axis), 1  # a pixel for the smooth edge

    def span(center: float) -> slice:
        start, stop = floor((center - reach) * size) - margin, ceil((center + reach) * size) + margin
        return slice(max(start, 0), max(stop, 0))

    rows, columns = span(center_y), span(center_x)
    x, y = axis[columns] - np.float32(center_x), axis[rows, None] - np.float32(center_y)
    return (rows, columns), *_turn(x, y, angle)


def _turn(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    return cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x


def _coverage(distance: Array, pixels_per_unit: float) -> Array:
    """Return the share of each pixel that lies inside, taking the edge for straight within a pixel."""
    covered: Array = np.clip(0.5 - distance * np.float32(pixels_per_unit), 0, 1)
    return covered


def _paint(canvas: Array, color: Array, opacity: Array) -> None:
    canvas += opacity[..., None] * (color - canvas)


def _resize(noise: Array, size: int) -> Array:
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


def _extent(owned: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(owned.any(axis=0)), np.flatnonzero(owned.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _colors(lightness: Array, chroma: float | Array, hue: Array) -> Array:
    """Convert Oklch, where equal steps of lightness look equal in every hue, to sRGB in 0..1 (Ottosson, 2020).

    Shape: (K,), () or (K,), (K,) -> (K, 3).
    """
    oklab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = np.clip((oklab @ _OKLAB_TO_LMS) ** 3 @ _LMS_TO_RGB, 0, 1)
    rgb: Array = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)
    return rgb


_OKLAB_TO_LMS = np.array(
    [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -1.2684380046, -0.0041960863],
        [-3.3077115913, 2.6097574011, -0.7034186147],
        [0.2309699292, -0.3413193965, 1.7076147010],
    ]
)
