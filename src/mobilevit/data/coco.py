"""Boxes in COCO's format: a `.json` file for all images of a part."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path

from mobilevit.data.boxes import Box, BoxTable, box_splits
from mobilevit.data.folders import PART_NAMES, NamesIn, find_parts, list_folder, part_in, relative, sub_folder
from mobilevit.data.imageset import ImageSet
from mobilevit.errors import MobileViTError, some
from mobilevit.files import Json
from mobilevit.progress import Progress
from mobilevit.tasks.targets import Boxes

_OTHER_KINDS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")  # of COCO's own files
_LISTS = ("images", "annotations", "categories")


def looks_like_coco(file: Path) -> bool:
    """Whether this is a file of COCO's, judged by its ends: COCO's own has 450 MB."""
    with file.open("rb") as stream:
        ends = stream.read(1 << 16)
        stream.seek(max(stream.tell(), file.stat().st_size - (1 << 16)))
        ends += stream.read()
    lists = any(f'"{key}"'.encode() in ends for key in _LISTS)
    return lists and any(key in ends for key in (b'"file_name"', b'"bbox"', b'"image_id"'))


def find_coco(folder: Path) -> list[Path]:
    """Find JSON files with boxes in `annotations`, else in the folder, else in its parts."""
    annotations = sub_folder(folder, ("annotations",))
    for places in ([annotations] if annotations else [], [folder], find_parts(folder).values()):
        files = [p for place in places for p in sorted(place.glob("*.json")) if p.is_file()]
        files = [p for p in files if not p.name.startswith((".", *_OTHER_KINDS)) and looks_like_coco(p)]
        if files:
            return [p for p in files if p.name.startswith("instances")] or files
    return []


def read_coco_file(file: Path) -> dict[str, ImageSet[Boxes]]:
    """Read a single file, with its images somewhere around it."""
    inside = file.parent.name.lower() == "annotations"
    return _read({"all": file}, file.parent.parent if inside else file.parent)


def read_coco(folder: Path, files: Sequence[Path]) -> dict[str, ImageSet[Boxes]]:
    """Read the `files` that `find_coco` found in the folder, a part each."""
    part_folders = find_parts(folder).values()
    by_part: dict[str, list[Path]] = {}
    for file in files:
        part = part_in(file.parent.name if file.parent in part_folders else file.stem)
        by_part.setdefault(part or "all", []).append(file)
    unnamed = by_part.pop("all", []) if len(by_part) > 1 else []
    for same in by_part.values():
        if len(same) > 1:
            names = some([relative(p, folder) for p in same])
            raise MobileViTError(f"{folder}: {names} are of the same part; give the path of one of them")
    return _read({part: by_part[part][0] for part in (*PART_NAMES, "all") if part in by_part}, folder, unnamed)


def _read(files: Mapping[str, Path], root: Path, unnamed: Sequence[Path] = ()) -> dict[str, ImageSet[Boxes]]:
    """Read a file for each part; all have the classes of the first."""
    tables: dict[str, BoxTable] = {}
    index_of: dict[Hashable, int] = {}
    for part, file in files.items():
        content = _load(file, {"annotations": []} if part == "test" else {})
        known = f"the categories of {next(iter(files.values()))}" if tables else "the categories"
        table = BoxTable(root=root, origin=str(file), word="annotation", known=known)
        categories = _categories(content, table)
        if not tables:
            index_of = {name: index for index, name in enumerate(dict.fromkeys(categories.values()))}
        # Ids may differ between the files; names are the classes.
        names = {key: name for key, name in categories.items() if name in index_of}
        place = part if part in PART_NAMES else part_in(file.stem)
        numbers = _add_images(table, content["images"], file, root, place)
        _add_boxes(table, content["annotations"], numbers, names)
        del content  # gigabytes, perhaps
        tables[part] = table
    for file in unnamed:
        remedy = "not used; name a part in its name, as in instances_train.json"
        next(iter(tables.values())).report(file, "annotations of no part", remedy=remedy)
    return box_splits(tables, tuple(str(name) for name in index_of), index_of)


def _load(file: Path, default: dict[str, list[Json]]) -> dict[str, list[Json]]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MobileViTError(f"{file}: not JSON ({error}); write or download it again") from None
    content = default | content if isinstance(content, dict) else {}
    lists = [content.get(key) for key in _LISTS]
    if not all(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) for entries in lists):
        raise MobileViTError(f"{file}: not COCO's format; it needs the lists images, annotations and categories")
    return {key: content[key] for key in _LISTS}


def _categories(content: dict[str, list[Json]], table: BoxTable) -> dict[Hashable, str]:
    """Return the names of the categories by id, in order."""
    try:
        categories = {int(entry["id"]): entry for entry in content["categories"]}
        names: dict[Hashable, str] = {number: str(categories[number]["name"]) for number in sorted(categories)}
    except (KeyError, TypeError, ValueError):
        raise MobileViTError(f"{table.origin}: a category without id or name; each needs both") from None
    # Roboflow's files begin with the name of the whole as category 0.
    unused = not any(entry.get("category_id") == 0 for entry in content["annotations"])
    topmost = [number for number, entry in categories.items() if entry.get("supercategory") == "none"]
    if len(names) > 1 and unused and topmost == [0]:
        table.report(table.origin, "category that stands for all others", names.pop(0), "not taken as a class")
    if not names:
        raise MobileViTError(f"{table.origin}: no categories; list the classes there")
    return names


# -- images ---------------------------------------------------------------------------------------------------------


def _add_images(
    table: BoxTable, entries: Sequence[Json], file: Path, root: Path, part: str | None
) -> dict[Hashable, int]:
    """Return the number of the image of each id; -1 if it is missing."""
    named = [e for e in entries if isinstance(e.get("file_name"), str) and isinstance(e.get("id"), int | str)]
    if len(named) < len(entries):
        detail = f"{len(entries) - len(named)} of {len(entries)}"
        table.report(file, "images without id or file_name", detail, "left out")
    if not named:
        raise MobileViTError(f"{file}: lists no images")
    names = [entry["file_name"].replace("\\", "/") for entry in named]
    names_in = cache(list_folder)
    numbers: dict[Hashable, int] = {}
    known: dict[Path, int] = {}
    with Progress("read annotations", len(named)) as progress:
        for entry, image in zip(named, _paths(names, file, root, part, names_in), strict=True):
            progress.advance(1)
            where = f"{file}, image {entry['id']}"
            if image in known:
                table.report(where, "image listed twice", entry["file_name"], "its boxes are put together")
            elif image.name not in names_in(image.parent):
                table.report(where, "annotation for a missing image", entry["file_name"], "left out")
            elif size := _stated_size(entry) or table.open_image(image):
                known[image] = table.add_image(image, file, size)
            numbers[entry["id"]] = known.get(image, -1)
    return numbers


def _stated_size(entry: Json) -> tuple[int, int] | None:
    """Return (width, height) in the annotations, which spares opening the image."""
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None


def _paths(names: Sequence[str], file: Path, root: Path, part: str | None, names_in: NamesIn) -> list[Path]:
    """Find the images of these names: in the folder that has most of a sample."""
    year = re.search(r"(?:train|val|test)\d+$", file.stem)
    folders = [*([year.group()] if year else []), *PART_NAMES.get(part or "", ()), ""]
    bases = [file.parent]
    for base in dict.fromkeys((root, file.parent, file.parent.parent)):
        bases += [base / above / folder for folder in folders for above in ("", "images", "JPEGImages")]
    # The paths in the file may be those of another machine.
    last_names = [name.rpartition("/")[2] for name in names]
    ways = [(base, way) for base in dict.fromkeys(bases) for way in (names, last_names)]
    step = max(1, len(names) // 100)
    found = [sum(p.name in names_in(p.parent) for p in (base / name for name in way[::step])) for base, way in ways]
    if not any(found):
        raise MobileViTError(f"{file}: none of its images found, such as {names[0]}; put them into {root / 'images'}")
    base, way = ways[found.index(max(found))]
    return [base / name for name in way]


# -- boxes ------------------------------------------------------------------------------------------------------------


def _add_boxes(
    table: BoxTable, entries: Sequence[Json], numbers: Mapping[Hashable, int], names: Mapping[Hashable, str]
) -> None:
    for entry in entries:
        where = f"{table.origin}, annotation {entry.get('id')}"
        try:
            owner = numbers.get(entry["image_id"])
            x, y, width, height = map(float, entry["bbox"])
            label = names.get(entry["category_id"], entry["category_id"])
            area = float(entry.get("area") or "nan")
        except (KeyError, TypeError, ValueError, OverflowError):
            detail = ", ".join(f"{key} {entry.get(key)}" for key in ("image_id", "category_id", "bbox"))
            table.report(where, "malformed annotation", detail[:80], "left out; it needs image_id, category_id, bbox")
            continue
        if owner is None:
            table.report(where, "annotation for an image that is not listed", f"image {entry['image_id']}", "left out")
        elif owner >= 0:
            crowd = bool(entry.get("iscrowd"))
            table.boxes.append(Box(owner, entry.get("id", 0), label, (x, y, x + width, y + height), crowd, area))
