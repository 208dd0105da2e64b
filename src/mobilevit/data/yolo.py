"""Boxes in YOLO's format: a `.txt` file for each image, and a `.yaml` or `classes.txt` for all."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from mobilevit.data.boxes import Box, BoxTable, box_splits
from mobilevit.data.folders import (
    IMAGE_FOLDERS,
    PART_NAMES,
    NamesIn,
    find_parts,
    has_file,
    list_folder,
    read_class_names,
    stem,
    sub_folder,
)
from mobilevit.data.imageset import ImageSet
from mobilevit.errors import MobileViTError, some
from mobilevit.files import Json
from mobilevit.imaging.decode import IMAGE_SUFFIXES, find_images
from mobilevit.progress import Progress
from mobilevit.tasks.targets import Boxes

_CLASS_FILES = ("classes.txt", "obj.names")


# -- with a YAML file -------------------------------------------------------------------------------------------------


def looks_like_yolo_yaml(file: Path) -> bool:
    """Whether this is a YAML file with names and parts at the top level."""
    if file.suffix.lower() not in (".yaml", ".yml") or not file.is_file() or file.stat().st_size > 1 << 20:
        return False
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    return all(re.search(key, text, re.MULTILINE) for key in (r"^names\s*:", r"^(train|val|test)\s*:"))


def find_yolo_yaml(folder: Path) -> list[Path]:
    """Find the description of the data: `data.yaml`, else others with names and parts."""
    if (folder / "data.yaml").is_file():
        return [folder / "data.yaml"]
    return [p for p in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if looks_like_yolo_yaml(p)]


def read_yolo_yaml(file: Path) -> dict[str, ImageSet[Boxes]]:
    """Read the parts that a YAML file names."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MobileViTError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    content = content if isinstance(content, dict) else {}
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        raise MobileViTError(f"{file}: no class names; list them under names")
    by_number: dict[Hashable, str] = {int(key): str(names[key]) for key in sorted(names, key=int)}
    return _read(_yaml_parts(file, content), by_number, root=file.parent)


def _yaml_parts(file: Path, content: Json) -> dict[str, list[Path]]:
    """List the images of each part."""
    base = str(content.get("path") or "")
    parts: dict[str, list[Path]] = {}
    for part, keys in PART_NAMES.items():
        value = next((content[key] for key in keys if content.get(key)), None)
        if value is None:
            continue
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        images = [p for v in values for p in _yaml_images(file, base, v)]
        if images:
            parts[part] = images
        elif part != "test":  # which is often named but not handed out
            raise MobileViTError(f"{file}: {part}: {some(values)} has no images; correct the path")
    if not parts:
        raise MobileViTError(f"{file}: names no images; give folders or lists under train and val")
    return parts


def _yaml_images(file: Path, base: str, value: str) -> list[Path]:
    """List the images of a folder or a list; paths are relative to `path`, else to the file."""
    shortened = re.sub(r"^(\.\./)+", "", value)  # Roboflow writes one ../ too many
    places = dict.fromkeys([file.parent / base / value, file.parent / value, file.parent / shortened])
    place = next((p for p in places if p.exists()), None)
    if place is None:
        return []
    if place.is_dir():
        return find_images(place)
    lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    bases = (file.parent / base, place.parent)
    found = [sum((folder / line).exists() for line in lines[:100]) for folder in bases]
    if not any(found):
        return []
    chosen = bases[found.index(max(found))]
    # Without "a/.." in them, paths are found in a listing; `Path.resolve` would follow links as well.
    return [Path(os.path.normpath(chosen / line)) for line in lines]


# -- without one ------------------------------------------------------------------------------------------------------


def find_yolo(folder: Path) -> dict[str, list[Path]]:
    """List the images of each part in a folder without YAML; {} if it is not in this layout."""
    images, labels = sub_folder(folder, IMAGE_FOLDERS), sub_folder(folder, ("labels",))
    if images and has_file(labels, ".txt", _CLASS_FILES):
        return {part: find_images(p) for part, p in (find_parts(images) or {"all": images}).items()}
    inner = {part: sub_folder(p, IMAGE_FOLDERS) for part, p in find_parts(folder).items()}
    found = {part: p for part, p in inner.items() if p and has_file(sub_folder(p.parent, ("labels",)), ".txt")}
    if found:
        return {part: find_images(p) for part, p in found.items()}
    if _class_file(folder):
        loose = {stem(p.name) for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}
        if any(p.stem in loose for p in folder.glob("*.txt")):
            return {"all": find_images(folder)}
    return {}


def read_yolo(folder: Path, parts: Mapping[str, list[Path]]) -> dict[str, ImageSet[Boxes]]:
    """Read the `parts` that `find_yolo` found in the folder."""
    file = _class_file(folder)
    return _read(parts, {} if file is None else dict(enumerate(read_class_names(file))), root=folder)


def _class_file(folder: Path) -> Path | None:
    places = [folder, folder / "labels", *(p / "labels" for p in find_parts(folder).values())]
    return next((place / name for place in places for name in _CLASS_FILES if (place / name).is_file()), None)


# -- images and their boxes -----------------------------------------------------------------------------------------


def _read(parts: Mapping[str, list[Path]], names: Mapping[Hashable, str], root: Path) -> dict[str, ImageSet[Boxes]]:
    names_in = cache(list_folder)
    tables = {part: _table(root, part, images, names_in) for part, images in parts.items()}
    first = next(iter(tables.values()))
    _report_unused_labels(first, [p for images in parts.values() for p in images], names_in)
    if not names:
        labels = (box.label for table in tables.values() for box in table.boxes)
        used = sorted({label for label in labels if isinstance(label, int)})
        names = {number: f"class_{number}" for number in used}
        first.report(root, "no class names", f"{len(used)} classes", "numbered; add a classes.txt with a name a line")
    classes = dict.fromkeys(names.values())
    index_of = {name: index for index, name in enumerate(classes)}
    return box_splits(tables, tuple(classes), {number: index_of[name] for number, name in names.items()})


def _table(root: Path, part: str, images: Sequence[Path], names_in: NamesIn) -> BoxTable:
    origin = str(root) if part == "all" else f"{root} ({part})"
    table = BoxTable(root=root, origin=origin, word="line", known="the class names")
    if not images:
        raise MobileViTError(f"{table.origin}: no images; known kinds are {', '.join(sorted(IMAGE_SUFFIXES))}")
    with Progress("read annotations", len(images)) as progress:
        for image in images:
            progress.advance(1)
            if size := table.open_image(image):
                places = (_label_file(image), image.with_suffix(".txt"))
                labels = next((file for file in places if file.name in names_in(file.parent)), None)
                owner = table.add_image(image, labels or image, size)
                if labels is None:
                    table.report(image, "image without an annotation file", remedy="taken as one without objects")
                else:
                    _add_lines(table, owner, labels)
    return table


def _label_file(image: Path) -> Path:
    """Return labels/train/a.txt for images/train/a.jpg: the last "images" of the path counts."""
    pieces = list(image.parent.parts)
    for number in range(len(pieces) - 1, -1, -1):
        if pieces[number].lower() in IMAGE_FOLDERS:
            pieces[number] = "labels"
            break
    return Path(*pieces, f"{image.stem}.txt")


def _add_lines(table: BoxTable, owner: int, labels: Path) -> None:
    """Add boxes and polygons, given in shares of the image's width and height."""
    width, height = table.sizes[owner]
    for line, text in enumerate(labels.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        words = text.split()
        if not words:
            continue
        where = f"{labels}, line {line}"
        try:
            label, *numbers = map(float, words)
            if label != int(label) or (len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2)):
                raise ValueError
        except (ValueError, OverflowError):
            remedy = "left out; a line is: class, center x, center y, width, height"
            table.report(where, "malformed line", text.strip()[:60], remedy)
            continue
        if max(map(abs, numbers)) > 2:
            remedy = "left out; divide by the image's width and height"
            table.report(where, "coordinates not in 0..1", text.strip()[:60], remedy)
            continue
        if len(numbers) == 4:
            x, y, w, h = numbers
            left, top, right, bottom = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        else:
            left, top, right, bottom = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
        table.boxes.append(Box(owner, line, int(label), (left * width, top * height, right * width, bottom * height)))


def _report_unused_labels(table: BoxTable, images: Sequence[Path], names_in: NamesIn) -> None:
    """Report label files beside those that were read whose images do not exist."""
    for folder in dict.fromkeys(image.parent for image in images):
        labels = _label_file(folder / "any").parent
        if labels == folder:
            continue  # text files beside images can be anything
        stems = {stem(name) for name in names_in(folder)}
        for name in sorted(names_in(labels)):
            if name.endswith(".txt") and name not in _CLASS_FILES and name[:-4] not in stems:
                table.report(labels / name, "annotation for a missing image", remedy="left out")
