"""Images of one class each: a folder per class, a CSV file, a parquet file, or shards (see `shards.py`)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobilevit.data.imageset import ImageSet, some
from mobilevit.data.shards import holds_shards, shard_splits
from mobilevit.errors import MobileViTError
from mobilevit.imaging.decode import IMAGE_SUFFIXES, Source, find_images

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")


def classification_splits(path: Path) -> dict[str, ImageSet[int]]:
    """Recognize what lies at `path`: a folder of images, a CSV or parquet file, or a folder of train/val parts.

    Folders hold one sub-folder per class. CSV files have columns `path` (relative to the file), `label` and, if you
    like, `split` (train or val). Parquet files have columns `image` (encoded bytes, or a struct with them) and `label`.
    Shards are tar files as WebDataset has them.

    Returns:
        {"train": ..., "val": ...} where the data are divided, else {"all": ...}.

    Raises:
        ValueError: nothing there, or nothing usable.
    """
    if holds_shards(path):
        return shard_splits(path)
    if path.is_file():
        return _from_file(path)
    train, val = _find_part(path, TRAIN_NAMES), _find_part(path, VAL_NAMES)
    # Among folders of images, one called "train" without folders in it is a class: vehicles.
    if train is None or (val is None and train.is_dir() and not _class_folders(train)):
        return {"all": _from_folder(path)}
    to_train_on = _from_folder(train) if train.is_dir() else _single(_from_file(train))
    if val is None:
        return {"all": to_train_on}
    held_out = _from_folder(val) if val.is_dir() else _single(_from_file(val))
    return {"train": to_train_on, "val": held_out.relabel(to_train_on.classes)}


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _from_folder(folder: Path) -> ImageSet[int]:
    class_folders = _class_folders(folder)
    if not class_folders:
        loose = "only loose files" if any(folder.iterdir()) else "nothing"
        raise MobileViTError(f"{folder}: {loose} in it; put the images into one sub-folder per class")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = find_images(class_folder)
        paths += found
        labels += [label] * len(found)
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise MobileViTError(f"{folder}: no images in its sub-folders; known kinds are {kinds}")
    return ImageSet(
        task="classification",
        origin=str(folder),
        names=[p.relative_to(folder).as_posix() for p in paths],
        targets=labels,
        classes=tuple(p.name for p in class_folders),
        open=paths.__getitem__,
    )


def _from_file(path: Path) -> dict[str, ImageSet[int]]:
    if path.suffix.lower() == ".csv":
        return _from_csv(path)
    if path.suffix.lower() == ".parquet":
        return {"all": _from_parquet(path)}
    raise MobileViTError(f"{path}: not a kind of data; give a folder, a .csv file (path, label) or a .parquet file")


def _from_csv(path: Path) -> dict[str, ImageSet[int]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            numbered = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MobileViTError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    rows = [row for _, row in numbered]
    if not rows:
        raise MobileViTError(f"{path}: no rows; a line an image is needed, under the heading path,label")
    if missing := {"path", "label"} - set(rows[0]):
        raise MobileViTError(f"{path}: no column {' and '.join(sorted(missing))}; the heading must name path and label")
    for line, row in numbered:
        if not row["path"] or not row["label"]:
            raise MobileViTError(f"{path}, line {line}: path or label is empty; fill it in or remove the line")
    names = [row["path"] for row in rows]
    classes = _sorted_classes({row["label"] for row in rows})
    index_of = {name: index for index, name in enumerate(classes)}
    everything = ImageSet(
        task="classification",
        origin=str(path),
        names=names,
        targets=[index_of[row["label"]] for row in rows],
        classes=classes,
        open=[path.parent / name for name in names].__getitem__,
    )
    if "split" not in rows[0]:
        return {"all": everything}
    kinds = [(row["split"] or "").lower() for row in rows]
    if unknown := sorted(set(kinds) - {*TRAIN_NAMES, *VAL_NAMES}):
        raise MobileViTError(f"{path}: split {some(unknown)} is neither train nor val")
    train = [i for i, kind in enumerate(kinds) if kind in TRAIN_NAMES]
    val = [i for i, kind in enumerate(kinds) if kind in VAL_NAMES]
    if not train or not val:
        return {"all": everything}
    return {"train": everything.subset(train), "val": everything.subset(val)}


def _from_parquet(path: Path) -> ImageSet[int]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MobileViTError(f"{path}: reading parquet needs pyarrow; pip install 'mobilevit[train]'") from None
    try:
        table = pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise MobileViTError(f"{path}: damaged or not a parquet file ({str(error).splitlines()[0]})") from None
    if missing := {"image", "label"} - set(table.column_names):
        raise MobileViTError(
            f"{path}: no column {' and '.join(sorted(missing))}; it needs image (encoded bytes) and label"
        )
    if not table.num_rows:
        raise MobileViTError(f"{path}: no rows")
    images = table["image"]
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        # The layout of Hugging Face datasets: {bytes, path}.
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not any(is_kind(images.type) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
        raise MobileViTError(f"{path}: column image holds {images.type}; it needs encoded images (bytes)")
    values = table["label"].to_pylist()
    if None in values:
        raise MobileViTError(f"{path}: row {values.index(None)} has no label; fill it in or remove the row")
    classes, labels = _parquet_labels(values, _parquet_class_names(table.schema.metadata or {}), path)
    return ImageSet(
        task="classification",
        origin=str(path),
        names=[f"row {row}" for row in range(len(values))],
        targets=labels,
        classes=classes,
        open=_ParquetImages(path, images),
    )


class _ParquetImages:
    """Encoded images by row; a process it is sent to reads the file itself."""

    def __init__(self, path: Path, column: Any) -> None:
        self.path, self.column = path, column

    def __call__(self, row: int) -> bytes:
        image: bytes = self.column[row].as_py()
        return image

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_parquet, (self.path,)


def _open_parquet(path: Path) -> Callable[[int], Source]:
    return _from_parquet(path).open


def _parquet_labels(values: list[Any], names: list[str] | None, path: Path) -> tuple[tuple[str, ...], list[int]]:
    if names is None:
        classes = _sorted_classes({str(value) for value in values})
        index_of = {name: index for index, name in enumerate(classes)}
        return classes, [index_of[str(value)] for value in values]
    if not all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        raise MobileViTError(f"{path}: labels outside 0..{len(names) - 1}, for which the file's metadata has names")
    return tuple(names), values


def _parquet_class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """Class names from the schema's metadata: a plain list, or the features of a Hugging Face data set."""
    for key in (b"classes", b"class_names", b"labels", b"names"):
        if key in metadata:
            text = metadata[key].decode()
            return [str(name) for name in json.loads(text)] if text.startswith("[") else text.split(",")
    if b"huggingface" in metadata:
        names = json.loads(metadata[b"huggingface"])["info"]["features"].get("label", {}).get("names")
        return None if names is None else [str(name) for name in names]
    return None


def _single(sets: dict[str, ImageSet[int]]) -> ImageSet[int]:
    return sets.get("all") or sets["train"]


def _find_part(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder or file for a part of the data; "Train" is as good as "train"."""
    entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    candidates = [name + suffix for name in names for suffix in ("", ".csv", ".parquet")]
    return next((entries[name] for name in candidates if name in entries), None)


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    """By number where all are numbers (so that 10 follows 9), else by name."""
    numeric = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))
