"""Find the parts of a data set, and its folders and files, by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mobilevit.errors import MobileViTError
from mobilevit.imaging.decode import IMAGE_SUFFIXES

Value = TypeVar("Value")
NamesIn = Callable[[Path], frozenset[str]]
"""`list_folder` with a cache."""

PART_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The parts of a data set, and how folders, files, lists and columns may spell them, in any case."""

IMAGE_FOLDERS = ("images", "jpegimages", "image", "imgs", "img", "pictures")
"""Names of folders of images."""


# -- parts ------------------------------------------------------------------------------------------------------------


def part_named(word: str) -> str | None:
    """Return the part that a word stands for, such as "val" for "Valid", or None."""
    return next((part for part, names in PART_NAMES.items() if word.strip().lower() in names), None)


def part_in(name: str) -> str | None:
    """Return the part that one of the words of a name stands for, such as "train" for "instances_train2017"."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    # COCO's "test-dev" is a test part.
    return next((part for part in ("train", "test", "val") if words & {*PART_NAMES[part]}), None)


def as_splits(parts: Mapping[str, Value]) -> dict[str, Value]:
    """Put parts in order; a train part alone is data that are not divided. A val or test part alone is held out."""
    if set(parts) in ({"train"}, {"all"}):
        return {"all": next(iter(parts.values()))}
    return {part: parts[part] for part in PART_NAMES if part in parts}


def find_parts(folder: Path) -> dict[str, Path]:
    """Find the sub-folders that are named for parts, such as {"train": ..., "val": ...}."""
    found = {part: sub_folders(folder, names) for part, names in PART_NAMES.items()}
    return {part: folders[0] for part, folders in found.items() if folders}


def read_lists(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Read which images belong to which part from `train.txt`, `val.txt` and `test.txt`, an image's name a line.

    `trainaug.txt`, which adds SBD's images to VOC's, comes before `train.txt`; without either, `trainval.txt` is the
    train part. Images that are also in a held-out list are not trained on.
    """
    found = {}
    for part, names in PART_NAMES.items():
        for name in ("trainaug", "train_aug", *names, "trainval") if part == "train" else names:
            file = folder / f"{name}.txt"
            if file.is_file():
                lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
                found[part] = (file, list(dict.fromkeys(line.strip() for line in lines if line.strip())))
                break
    if "train" in found:
        held_out = {name for part in found if part != "train" for name in found[part][1]}
        found["train"] = (found["train"][0], [name for name in found["train"][1] if name not in held_out])
    return found


# -- folders and files ------------------------------------------------------------------------------------------------


def sub_folders(folder: Path, names: Sequence[str]) -> list[Path]:
    """Find the sub-folders with one of these names, in any case, in the order of `names`."""
    if not folder.is_dir():
        return []
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
    folders = {entry.name.lower(): Path(entry.path) for entry in entries if entry.is_dir()}
    return [folders[name] for name in names if name in folders]


def sub_folder(folder: Path, names: Sequence[str]) -> Path | None:
    """Find the first of the sub-folders with one of these names."""
    return next(iter(sub_folders(folder, names)), None)


def has_file(folder: Path | None, suffixes: str | tuple[str, ...], but: Sequence[str] = ()) -> bool:
    """Whether a file with one of the suffixes lies in the folder or below, other than those named in `but`."""
    if folder is None:
        return False
    return any(n.lower().endswith(suffixes) and n not in but for _, _, names in os.walk(folder) for n in names)


def list_folder(folder: Path) -> frozenset[str]:
    """List a folder, which is much faster than asking for every file; one that does not exist is empty."""
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208, twice as fast
    except OSError:
        return frozenset()


def stem(name: str) -> str:
    """Remove the suffix of an image or annotation from a name; "scene.2" has none."""
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in {*IMAGE_SUFFIXES, ".xml"} else name


def relative(path: Path, root: Path) -> str:
    """Name a path as seen from `root`, if it lies below."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def read_class_names(file: Path) -> list[str]:
    """Read a class name from each line, in UTF-8; only lines at the end may be empty."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError:
        raise MobileViTError(f"{file}: cannot be read; it needs a name a line, in UTF-8") from None
    if not lines or "" in lines:
        where = f", line {lines.index('') + 1}" if lines else ""
        raise MobileViTError(f"{file}{where}: class names are missing; write one a line")
    return lines
