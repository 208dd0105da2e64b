"""Images with a class for every pixel: a folder of images and one of masks, or Pascal VOC."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilevit.class_names import IGNORE, VOC_CLASSES
from mobilevit.data.folders import (
    IMAGE_FOLDERS,
    as_splits,
    find_parts,
    has_file,
    read_class_names,
    read_lists,
    sub_folder,
    sub_folders,
)
from mobilevit.data.imageset import ImageSet, Problem
from mobilevit.errors import ImageError, MobileViTError, some
from mobilevit.imaging.decode import find_images
from mobilevit.progress import Progress
from mobilevit.tasks.segmentation import SEGMENTATION
from mobilevit.tasks.targets import Mask, read_label_map

VALUE_WITHOUT_CLASS = "value without a class"
_UNUSED = "mask without an image"
_MASK_FOLDERS = ("masks", "mask", "annotations", "labels")
_MASK_SUFFIXES = (".gif", ".tiff", ".tif", ".bmp", ".png")  # the last one that a name has is taken
_LAYOUTS = "images/ and masks/ (PNG, named as the images), or Pascal VOC (JPEGImages/, SegmentationClass/)"
_ADE20K = "objectInfo150.txt"
_NAME_255 = 'add classes.json to name it, such as {"0": "background", "255": "object"}'


def has_masks(path: Path) -> bool:
    """Whether masks lie at `path` in one of the layouts of `segmentation_splits`; only a few names are looked at."""
    return bool(_layouts(path))


def segmentation_splits(path: Path) -> dict[str, ImageSet[Mask]]:
    """Recognize and read masks, gray or palette images whose values are class numbers, in one of two layouts.

    - `images/` and `masks/` (or `annotations/`, `labels/`), with sub-folders `train`, `val`, `test` or without, or
      both in each of `train`, `val`, `test`. A mask has the name of its image.
    - Pascal VOC: `JPEGImages/`, `SegmentationClass/` and `ImageSets/Segmentation/{train,val,test}.txt`. Where the masks
      of SBD were added as `SegmentationClassAug/`, these, and `trainaug.txt` (or `train_aug.txt`) beside the lists.

    Classes stand in `classes.txt`, a name a line, by value from 0, or in `classes.json`: a list, or
    `{"value": "name"}`. ADE20k's `objectInfo150.txt` is read, too: its classes begin at 1. Without any of them they are
    those of VOC in its layout, else numbered by the values found.
    Values without a name are neither trained on nor counted; nor is 255, unless `classes.json` names it.

    Whatever is wrong with single files is in the `problems` of the sets, with what was done about it.

    Raises:
        MobileViTError: none of these layouts, no image with a mask, or a part that names nothing that exists.
    """
    layouts = _layouts(path)
    if not layouts:
        raise MobileViTError(f"{path}: no masks found; the layouts are {_LAYOUTS}")
    if len(layouts) > 1:
        raise MobileViTError(f"{path}: holds {some([str(layout.root) for layout in layouts])}; give the path of one")
    layout = layouts[0]
    pairs = _pairs(layout)
    first = next(iter(pairs.values()))
    if len(pairs) > 1 and "test" in pairs and not pairs["test"].masks:  # images to test on are often without masks
        first.problems.append(Problem(pairs.pop("test").origin, "test part without masks", remedy="left out"))
    for part, found in pairs.items():
        if not found.masks:
            why = found.problems[0] if found.problems else f"nothing in {found.origin}"
            raise MobileViTError(f"{layout.root}: not one image of {part} has a mask ({why}); {_LAYOUTS}")
    names, problems = _name_values([path, layout.root], layout, [m for found in pairs.values() for m in found.masks])
    first.problems.extend(problems)
    numbers: dict[str, int] = {}
    class_of = bytearray([IGNORE]) * 256
    for value, name in names.items():
        class_of[value] = numbers.setdefault(name, len(numbers))
    return as_splits(
        {
            part: ImageSet(
                task=SEGMENTATION,
                origin=found.origin,
                names=[image.relative_to(layout.root).as_posix() for image in found.images],
                targets=[Mask(path=mask, class_of=bytes(class_of)) for mask in found.masks],
                classes=tuple(numbers),
                open=found.images.__getitem__,
                problems=tuple(found.problems),
            )
            for part, found in pairs.items()
        }
    )


# -- images and their masks -------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    root: Path
    folders: dict[str, tuple[Path, Path]]
    """For each part: the folder of its images, and that of its masks."""
    is_voc: bool = False


class _Pairs(NamedTuple):
    """The images of one part that have a mask, with it."""

    origin: str
    images: list[Path]
    masks: list[Path]
    problems: list[Problem]


def _layouts(path: Path) -> list[_Layout]:
    """Find what lies at `path`, or in folders such as VOCdevkit/VOC2012 below it."""
    if not path.is_dir():
        return []
    if folders := _folders(path):
        return [_Layout(path, folders)]
    found = []
    for base in (path, *sorted(path.glob("VOC20*")), *sorted(path.glob("VOCdevkit/VOC20*"))):
        images, added = base / "JPEGImages", base / "SegmentationClassAug"
        masks = added if added.is_dir() else base / "SegmentationClass"
        if images.is_dir() and has_file(masks, _MASK_SUFFIXES):
            found.append(_Layout(base, {"all": (images, masks)}, is_voc=True))
    return found


def _folders(path: Path) -> dict[str, tuple[Path, Path]]:
    images, masks = sub_folder(path, IMAGE_FOLDERS), _mask_folder(path)
    if images and masks:
        parts_of_masks = find_parts(masks)
        divided = {
            part: (folder, parts_of_masks.get(part, masks / part) if parts_of_masks else masks)
            for part, folder in find_parts(images).items()
        }
        return divided or {"all": (images, masks)}
    both = {}
    for part, folder in find_parts(path).items():
        images, masks = sub_folder(folder, IMAGE_FOLDERS), _mask_folder(folder)
        if images:
            both[part] = (images, masks or folder / _MASK_FOLDERS[0])
    return both if any(masks.is_dir() for _, masks in both.values()) else {}


def _mask_folder(folder: Path) -> Path | None:
    return next((p for p in sub_folders(folder, _MASK_FOLDERS) if has_file(p, _MASK_SUFFIXES)), None)


def _pairs(layout: _Layout) -> dict[str, _Pairs]:
    if layout.is_voc and (lists := read_lists(layout.root / "ImageSets/Segmentation")):
        images, masks = _images_and_masks(*layout.folders["all"])
        return {part: _pair(str(file), names, images, masks) for part, (file, names) in lists.items()}
    pairs = {}
    every: dict[Path, None] = {}
    for part, (image_folder, mask_folder) in layout.folders.items():
        images, masks = _images_and_masks(image_folder, mask_folder)
        pairs[part] = _pair(str(image_folder), images, images, masks)
        every |= dict.fromkeys(masks.values())
    used = {mask for found in pairs.values() for mask in found.masks}  # parts may share a folder of masks
    unused = [Problem(str(mask), _UNUSED, remedy="left out") for mask in every if mask not in used]
    next(iter(pairs.values())).problems.extend(unused)
    return pairs


def _pair(origin: str, names: Iterable[str], images: Mapping[str, Path], masks: Mapping[str, Path]) -> _Pairs:
    pairs = _Pairs(origin, [], [], [])
    for name in names:
        image, mask = images.get(name), masks.get(name)
        if image and mask:
            pairs.images.append(image)
            pairs.masks.append(mask)
        elif image:
            pairs.problems.append(Problem(str(image), "image without a mask", remedy="left out"))
        elif mask:
            pairs.problems.append(Problem(str(mask), _UNUSED, remedy="left out"))
        else:
            pairs.problems.append(Problem(origin, "listed image that is missing", name, "left out"))
    return pairs


def _images_and_masks(images: Path, masks: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """List both by their path in the folder without suffix, such as "city/0001"."""

    def by_stem(files: Iterable[Path], folder: Path) -> dict[str, Path]:
        return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}

    files = [p for p in (find_images(masks) if masks.is_dir() else []) if p.suffix.lower() in _MASK_SUFFIXES]
    files.sort(key=lambda p: _MASK_SUFFIXES.index(p.suffix.lower()))  # the last one of a name counts
    return by_stem(find_images(images), images), by_stem(files, masks)


# -- classes ----------------------------------------------------------------------------------------------------------


def _name_values(
    places: Iterable[Path], layout: _Layout, masks: Sequence[Path]
) -> tuple[dict[int, str], list[Problem]]:
    """Name the values in the masks, and report what some of the masks have against these names."""
    candidates = (place / name for place in places for name in ("classes.json", "classes.txt", _ADE20K))
    file = next((p for p in candidates if p.is_file()), None)
    if file is None and not layout.is_voc:
        used, problems = _values(masks, 200)
        if max(used) == IGNORE and len(used) <= 2:
            raise MobileViTError(f"{layout.root}: masks of only the values {some([*map(str, used)])}; {_NAME_255}")
        names = {value: f"class_{value}" for value in used if value != IGNORE}
        detail = f"values {some([*map(str, names)], 20)}"
        remedy = "classes are numbered; add a classes.txt with a name a line"
        return names, [*problems, Problem(str(layout.root), "no class names", detail, remedy)]
    names = dict(enumerate(VOC_CLASSES)) if file is None else _read_names(file)
    used, problems = _values(masks, 20)
    if used == [0, IGNORE] and IGNORE not in names:
        where = str(masks[0].parent)
        problems.append(Problem(where, "masks of 0 and 255 only", remedy=f"255 is not counted; {_NAME_255}"))
    where = "the 21 classes of VOC" if file is None else str(file)
    void = {0} if file is not None and file.name == _ADE20K else set()
    return names, problems + values_without_class(set(used) - names.keys() - void, where)


def values_without_class(values: Iterable[int], file: str) -> list[Problem]:
    """Describe each value of the masks that no class stands for, except the ignore label."""
    remedy = "treated as void: neither trained on nor counted; name it in classes.txt or leave it so"
    return [Problem(file, VALUE_WITHOUT_CLASS, str(value), remedy) for value in sorted(values) if value != IGNORE]


def _read_names(file: Path) -> dict[int, str]:
    if file.suffix == ".txt" and file.name != _ADE20K:
        lines = read_class_names(file)
        if len(lines) > IGNORE:
            raise MobileViTError(f"{file}: {len(lines)} classes; a mask can have 255, as 255 is the ignore label")
        return dict(enumerate(lines))
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.name == _ADE20K:  # titles, then lines as "2  0.1072  6046  612  building, edifice", with tabs
            rows = [line.split("\t") for line in text.splitlines()[1:]]
            content = {row[0]: row[-1].partition(",")[0] for row in rows}
        else:
            content = json.loads(text)
        pairs = enumerate(content) if isinstance(content, list) else content.items()
        names = {int(value): str(name).strip() for value, name in pairs}
    except (ValueError, AttributeError, RecursionError):
        form = "lines of a number, a tab and a name" if file.name == _ADE20K else 'a list of names, or {"0": "name"}'
        raise MobileViTError(f"{file}: cannot be read; it needs {form}") from None
    if not names or not all(names.values()) or not all(0 <= value <= IGNORE for value in names):
        raise MobileViTError(f"{file}: names missing, or values outside 0..255; each class needs a name and a value")
    return dict(sorted(names.items()))


def _values(masks: Sequence[Path], limit: int) -> tuple[list[int], list[Problem]]:
    """List the values in up to `limit` masks, taken evenly from all."""
    sample = masks[:: -(-len(masks) // limit)]
    values: set[int] = set()
    problems = []
    with Progress("read masks", len(sample), "masks") as progress:
        for mask in sample:
            progress.advance(1)
            try:
                values.update(np.unique(read_label_map(mask)).tolist())
            except ImageError as error:
                problems.append(unusable_mask(mask, error))
    if not values:
        raise MobileViTError(f"{problems[-1].file}: {problems[-1].detail}")
    return sorted(values), problems


def unusable_mask(mask: Path, error: ImageError) -> Problem:
    """Describe a mask that `read_label_map` refuses."""
    return Problem(str(mask), "mask that cannot be used", str(error).removeprefix(f"{mask}: "))
