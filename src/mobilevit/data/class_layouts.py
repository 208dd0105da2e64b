"""Images of one class each: a folder per class, a CSV file or parquet files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.data.folders import PART_NAMES, as_splits, part_named, sub_folders
from mobilevit.data.imageset import ImageSet, Problem
from mobilevit.errors import MobileViTError, some
from mobilevit.imaging.decode import IMAGE_SUFFIXES, Source, find_images
from mobilevit.runtime.engine import import_runtime
from mobilevit.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:
    import pyarrow as pa

_Open = Callable[[int], Source]
_Rows = tuple[ImageSet[int], list[str] | None]
"""Images, and the word that each has in the column `split`, if there is one."""


def classification_splits(path: Path) -> dict[str, ImageSet[int]]:
    """Recognize and read a folder of images, a CSV or parquet file, or a folder with such parts.

    Folders hold one sub-folder per class. CSV files have columns `path` (relative to the file) and `label`, parquet
    files `image` (encoded bytes, or a struct with them) and `label`; a column `split` divides either. The parts in a
    folder are sub-folders, or files such as `train.csv`, `test.parquet` or `train-00000-of-00002.parquet`.
    """
    if path.is_file():
        return _divide(*_read_rows([path]))
    parts = _find_parts(path)
    if not _are_parts(parts, path):
        return {"all": _from_folder(path)}
    problems: tuple[Problem, ...] = ()
    if len(parts) > 1 and "test" in parts and not _has_labels(parts["test"]):
        remedy = "left out; put the images into one sub-folder per class"
        problems = (Problem(str(parts.pop("test")[0]), "test part without classes", remedy=remedy),)
    sets = {part: _read_part(part, places) for part, places in parts.items()}
    all_classes = {name for data in sets.values() for name in data.classes}
    classes = sets["train"].classes if "train" in sets else _sorted_classes(all_classes)
    sets = {part: data.relabel(classes) for part, data in sets.items()}
    first = next(iter(sets))
    sets[first] = replace(sets[first], problems=sets[first].problems + problems)
    return as_splits(sets)


# -- parts ------------------------------------------------------------------------------------------------------------


def _find_parts(folder: Path) -> dict[str, list[Path]]:
    """Find what belongs to each part: a folder of class folders, else CSV or parquet files, else any folder."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    found = {}
    for part, names in PART_NAMES.items():
        pattern = re.compile(rf"({'|'.join(names)})(-\d+(-of-\d+)?)?\.(csv|parquet)")
        named = [file for file in files if pattern.fullmatch(file.name.lower())]
        folders = sub_folders(folder, names)
        candidates = [
            *([p] for p in folders if _class_folders(p)),
            [file for file in named if file.suffix.lower() == ".csv"],
            [file for file in named if file.suffix.lower() == ".parquet"],
            folders[:1],
        ]
        places = next((places for places in candidates if places), None)
        if places:
            found[part] = places
    return found


def _has_labels(places: Sequence[Path]) -> bool:
    return places[0].is_file() or bool(_class_folders(places[0]))


def _are_parts(parts: dict[str, list[Path]], folder: Path) -> bool:
    """Whether what is named for parts are parts, and not folders of images of a class with such a name."""
    if "train" in parts:
        return len(parts) > 1 or _has_labels(parts["train"])
    if any(places[0].is_file() for places in parts.values()):
        return True
    others = [p for p in _class_folders(folder) if part_named(p.name) is None]
    return bool(parts) and not others and all(map(_has_labels, parts.values()))


def _read_part(part: str, places: Sequence[Path]) -> ImageSet[int]:
    if places[0].is_dir():
        return _from_folder(places[0])
    data, words = _read_rows(places)
    if others := sorted({word for word in words or () if part_named(word) != part}):
        remedy = "remove these rows, or the column"
        raise MobileViTError(f"{data.origin}: holds the {part} part, but has rows with split {some(others)}; {remedy}")
    return data


def _divide(data: ImageSet[int], words: list[str] | None) -> dict[str, ImageSet[int]]:
    if words is None:
        return {"all": data}
    parts = [part_named(word) for word in words]
    if unknown := sorted({word for word, part in zip(words, parts, strict=True) if part is None}):
        raise MobileViTError(f"{data.origin}: split {some(unknown)} is neither train nor val nor test")
    rows = {part: [i for i, other in enumerate(parts) if other == part] for part in PART_NAMES}
    return as_splits({part: data.subset(numbers) for part, numbers in rows.items() if numbers})


# -- folders ----------------------------------------------------------------------------------------------------------


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _from_folder(folder: Path) -> ImageSet[int]:
    class_folders = _class_folders(folder)
    if not class_folders:
        loose = "only loose files" if any(folder.iterdir()) else "nothing"
        raise MobileViTError(f"{folder}: {loose} in it; put the images into one sub-folder per class")
    found = [(image, p.name) for p in class_folders for image in find_images(p)]
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise MobileViTError(f"{folder}: no images in its sub-folders; known kinds are {kinds}")
    paths, labels = zip(*found, strict=True)
    names = [p.relative_to(folder).as_posix() for p in paths]
    return _image_set(str(folder), names, labels, paths.__getitem__, [p.name for p in class_folders])


def _image_set(
    origin: str, names: Sequence[str], labels: Sequence[str], open_number: _Open, classes: Sequence[str] | None = None
) -> ImageSet[int]:
    """Number the labels: in the order of `classes`, else sorted."""
    classes = tuple(_sorted_classes(set(labels)) if classes is None else classes)
    index_of = {name: index for index, name in enumerate(classes)}
    targets = [index_of[label] for label in labels]
    return ImageSet(task=CLASSIFICATION, origin=origin, names=names, targets=targets, classes=classes, open=open_number)


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    """Sort by number if all are numbers, so that 10 follows 9, else by name."""
    numeric = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


# -- CSV --------------------------------------------------------------------------------------------------------------


def _read_rows(files: Sequence[Path]) -> _Rows:
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".parquet"}:
        return _from_parquet(files)
    if kinds != {".csv"}:
        raise MobileViTError(f"{files[0]}: no kind of data; give a folder, a .csv (path, label) or a .parquet file")
    if len(files) > 1:
        raise MobileViTError(f"{files[0]}: beside {files[1].name}, which is of the same part; keep one of them")
    return _from_csv(files[0])


def _from_csv(path: Path) -> _Rows:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = set(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise MobileViTError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise MobileViTError(f"{path}: no rows; a line an image is needed, under the heading path,label")
    if missing := {"path", "label"} - columns:
        raise MobileViTError(f"{path}: no column {' and '.join(sorted(missing))}; the heading must name path and label")
    for line, row in rows:
        if not row["path"] or not row["label"]:
            raise MobileViTError(f"{path}, line {line}: path or label is empty; fill it in or remove the line")
    names = [row["path"] for _, row in rows]
    paths = [path.parent / name for name in names]
    data = _image_set(str(path), names, [row["label"] for _, row in rows], paths.__getitem__)
    return data, [row["split"] or "" for _, row in rows] if "split" in columns else None


# -- parquet ----------------------------------------------------------------------------------------------------------


def _from_parquet(files: Sequence[Path]) -> _Rows:
    table = _read_parquet(files)
    path = files[0]
    if missing := {"image", "label"} - set(table.column_names):
        named = " and ".join(sorted(missing))
        raise MobileViTError(f"{path}: no column {named}; it needs image (encoded bytes) and label")
    if not table.num_rows:
        raise MobileViTError(f"{path}: no rows")
    values = table["label"].to_pylist()
    if None in values:
        raise MobileViTError(f"{path}: row {values.index(None)} has no label; fill it in or remove the row")
    classes = _class_names(table.schema.metadata or {})
    if classes is not None:
        if not all(isinstance(value, int) and 0 <= value < len(classes) for value in values):
            raise MobileViTError(f"{path}: labels outside 0..{len(classes) - 1}, which its metadata has names for")
        values = [classes[value] for value in values]
    data = _image_set(
        str(path if len(files) == 1 else path.parent),
        [f"row {row}" for row in range(len(values))],
        [str(value) for value in values],
        _ParquetImages(files, table),
        classes,
    )
    words = [str(word or "") for word in table["split"].to_pylist()] if "split" in table.column_names else None
    return data, words


def _read_parquet(files: Sequence[Path]) -> pa.Table:
    """Read several files as one table."""
    pq = import_runtime("pyarrow.parquet", "train")
    import pyarrow as pa

    try:
        return pa.concat_tables([pq.read_table(file, memory_map=True) for file in files])
    except (pa.ArrowException, OSError) as error:
        named = some([str(file) for file in files])
        raise MobileViTError(f"{named}: damaged or not a parquet file ({str(error).splitlines()[0]})") from None


class _ParquetImages:
    """Encoded images by row; a process it is sent to reads the files itself."""

    def __init__(self, files: Sequence[Path], table: pa.Table | None = None) -> None:
        import pyarrow as pa

        self.files = files
        self.column = (_read_parquet(files) if table is None else table)["image"]
        kind = self.column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            # The layout of Hugging Face datasets: {bytes, path}.
            self.column = pa.chunked_array([chunk.field("bytes") for chunk in self.column.chunks])
        if not (pa.types.is_binary(self.column.type) or pa.types.is_large_binary(self.column.type)):
            raise MobileViTError(f"{files[0]}: column image holds {kind}; it needs encoded images (bytes)")

    def __call__(self, row: int) -> bytes:
        image: bytes = self.column[row].as_py()
        return image

    def __reduce__(self) -> tuple[type[_ParquetImages], tuple[Sequence[Path]]]:
        return _ParquetImages, (self.files,)


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Read class names from the features of a Hugging Face data set."""
    if b"huggingface" not in metadata:
        return None
    names = json.loads(metadata[b"huggingface"])["info"]["features"].get("label", {}).get("names")
    return None if names is None else [str(name) for name in names]
