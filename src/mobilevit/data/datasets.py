"""Labelled pictures from folders, CSV and parquet files, as one simple thing: an `ImageSet`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mobilevit.preprocessing import IMAGE_SUFFIXES, Source

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labelled pictures that are opened by number."""

    origin: str
    """Where they come from, for messages."""
    names: Sequence[str]
    """What to call each picture: a path relative to the origin, or a row."""
    labels: Sequence[int]
    """Index into `classes`, one a picture."""
    classes: tuple[str, ...]
    """Class names."""
    open: Callable[[int], Source]
    """Number of a picture -> what `read_image` takes. Can be pickled, for reading processes that are not forked."""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The pictures at `indices`, in that order."""
        return replace(
            self,
            names=[self.names[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            open=partial(_open_at, self.open, indices),
        )

    def fingerprint(self) -> str:
        """A short hash of names and labels: equal for equal data, wherever they lie."""
        lines = sorted(f"{self.classes[label]}\t{name}" for name, label in zip(self.names, self.labels, strict=True))
        # File names need not be UTF-8; Python keeps their other bytes as surrogates.
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]

    def relabel(self, classes: tuple[str, ...]) -> ImageSet:
        """The same pictures, labelled in the order of a model's `classes`.

        Raises:
            ValueError: a class the model does not know.
        """
        if self.classes == classes:
            return self
        used = set(self.labels)
        unknown = [name for index, name in enumerate(self.classes) if index in used and name not in classes]
        if unknown:
            raise ValueError(
                f"{self.origin}: the checkpoint does not know {_some(unknown)}; its classes are {_some(classes)}. "
                "Rename the classes of the data or choose another checkpoint"
            )
        index_of = {name: index for index, name in enumerate(classes)}
        return replace(self, labels=[index_of[self.classes[label]] for label in self.labels], classes=classes)


def find_splits(path: str | os.PathLike[str]) -> dict[str, ImageSet]:
    """Recognise what lies at `path`: a folder of pictures, a CSV or parquet file, or a folder of train/val parts.

    Folders hold one sub-folder per class. CSV files have columns `path` (relative to the file), `label` and, if you
    like, `split` (train or val). Parquet files have columns `image` (encoded bytes, or a struct with them) and `label`.

    Returns:
        {"train": ..., "val": ...} where the data are divided, else {"all": ...}.

    Raises:
        ValueError: nothing there, or nothing usable.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; --data takes a folder with one sub-folder per class")
    if path.is_file():
        return _from_file(path)
    train, val = _find_part(path, TRAIN_NAMES), _find_part(path, VAL_NAMES)
    # Among folders of pictures, one called "train" without folders in it is a class: vehicles.
    if train is None or (val is None and train.is_dir() and not _class_folders(train)):
        return {"all": _from_folder(path)}
    to_train_on = _from_folder(train) if train.is_dir() else _single(_from_file(train))
    if val is None:
        return {"all": to_train_on}
    held_out = _from_folder(val) if val.is_dir() else _single(_from_file(val))
    return {"train": to_train_on, "val": held_out.relabel(to_train_on.classes)}


def load_train_val(
    path: str | os.PathLike[str], *, val_path: str | os.PathLike[str] | None, val_fraction: float, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Data to train on and data to validate on; data that are not divided are split, stratified and seeded.

    Raises:
        ValueError: unusable data, fewer than two classes, or a class too small to be divided.
    """
    splits = find_splits(path)
    if val_path is not None:
        train = splits.get("train") or splits["all"]
        other = find_splits(val_path)
        val = (other.get("val") or other.get("all") or other["train"]).relabel(train.classes)
    elif "val" in splits:
        train, val = splits["train"], splits["val"]
    else:
        check_classes(splits["all"])
        train, val = split(splits["all"], val_fraction=val_fraction, seed=seed)
    check_classes(train)
    return train, val


def check_classes(data: ImageSet) -> None:
    """Refuse data that nothing can be learnt from."""
    counts = Counter(data.labels)
    empty = [name for index, name in enumerate(data.classes) if not counts[index]]
    if empty:
        raise ValueError(f"{data.origin}: no pictures of {_some(empty)}; add some or remove the class")
    if len(data.classes) < 2:
        raise ValueError(
            f"{data.origin}: only one class ({data.classes[0]}); a classifier needs two or more, one sub-folder each"
        )


def split(data: ImageSet, *, val_fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out `val_fraction` of every class, at least one picture; the same for the same names and seed.

    Raises:
        ValueError: a class of one picture.
    """
    train: list[int] = []
    val: list[int] = []
    by_class: dict[int, list[int]] = {}
    for number in sorted(range(len(data)), key=lambda i: data.names[i]):
        by_class.setdefault(data.labels[number], []).append(number)
    for label, numbers in sorted(by_class.items()):
        if len(numbers) < 2:
            raise ValueError(
                f"{data.origin}: class {data.classes[label]} has only one picture; two are needed, one to train on and "
                "one to validate on. Add pictures, or give --val-data"
            )
        # Seeded by the class's name, so that adding a class leaves the others' division as it was.
        random.Random(f"{seed}/{data.classes[label]}").shuffle(numbers)
        count = min(max(1, round(len(numbers) * val_fraction)), len(numbers) - 1)
        val += numbers[:count]
        train += numbers[count:]
    return data.subset(sorted(train)), data.subset(sorted(val))


def find_images(folder: Path) -> list[Path]:
    """Every picture below a folder, by suffix, sorted; hidden files and folders are passed over."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _from_folder(folder: Path) -> ImageSet:
    class_folders = _class_folders(folder)
    if not class_folders:
        loose = "only loose files" if any(folder.iterdir()) else "nothing"
        raise ValueError(f"{folder}: {loose} in it; put the pictures into one sub-folder per class")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = find_images(class_folder)
        paths += found
        labels += [label] * len(found)
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: no pictures in its sub-folders; known kinds are {kinds}")
    return ImageSet(
        origin=str(folder),
        names=[p.relative_to(folder).as_posix() for p in paths],
        labels=labels,
        classes=tuple(p.name for p in class_folders),
        open=paths.__getitem__,
    )


def _from_file(path: Path) -> dict[str, ImageSet]:
    if path.suffix.lower() == ".csv":
        return _from_csv(path)
    if path.suffix.lower() == ".parquet":
        return {"all": _from_parquet(path)}
    raise ValueError(f"{path}: not a kind of data; give a folder, a .csv file (path, label) or a .parquet file")


def _from_csv(path: Path) -> dict[str, ImageSet]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            numbered = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    rows = [row for _, row in numbered]
    if not rows:
        raise ValueError(f"{path}: no rows; a line a picture is needed, under the heading path,label")
    if missing := {"path", "label"} - set(rows[0]):
        raise ValueError(f"{path}: no column {' and '.join(sorted(missing))}; the heading must name path and label")
    for line, row in numbered:
        if not row["path"] or not row["label"]:
            raise ValueError(f"{path}, line {line}: path or label is empty; fill it in or remove the line")
    names = [row["path"] for row in rows]
    classes = _sorted_classes({row["label"] for row in rows})
    index_of = {name: index for index, name in enumerate(classes)}
    everything = ImageSet(
        origin=str(path),
        names=names,
        labels=[index_of[row["label"]] for row in rows],
        classes=classes,
        open=[path.parent / name for name in names].__getitem__,
    )
    if "split" not in rows[0]:
        return {"all": everything}
    kinds = [(row["split"] or "").lower() for row in rows]
    if unknown := sorted(set(kinds) - {*TRAIN_NAMES, *VAL_NAMES}):
        raise ValueError(f"{path}: split {_some(unknown)} is neither train nor val")
    train = [i for i, kind in enumerate(kinds) if kind in TRAIN_NAMES]
    val = [i for i, kind in enumerate(kinds) if kind in VAL_NAMES]
    if not train or not val:
        return {"all": everything}
    return {"train": everything.subset(train), "val": everything.subset(val)}


def _from_parquet(path: Path) -> ImageSet:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install 'mobilevit[train]'") from None
    try:
        table = pq.read_table(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not a parquet file ({str(error).splitlines()[0]})") from None
    if missing := {"image", "label"} - set(table.column_names):
        raise ValueError(f"{path}: no column {' and '.join(sorted(missing))}; it needs image (encoded bytes) and label")
    if not table.num_rows:
        raise ValueError(f"{path}: no rows")
    images = table["image"]
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        # The layout of Hugging Face datasets: {bytes, path}.
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    if not any(is_kind(images.type) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
        raise ValueError(f"{path}: column image holds {images.type}; it needs encoded pictures (bytes)")
    values = table["label"].to_pylist()
    if None in values:
        raise ValueError(f"{path}: row {values.index(None)} has no label; fill it in or remove the row")
    classes, labels = _parquet_labels(values, _parquet_class_names(table.schema.metadata or {}), path)
    return ImageSet(
        origin=str(path),
        names=[f"row {row}" for row in range(len(values))],
        labels=labels,
        classes=classes,
        open=_ParquetImages(path, images),
    )


class _ParquetImages:
    """Encoded pictures by row; a process it is sent to reads the file itself."""

    def __init__(self, path: Path, column: Any) -> None:
        self.path, self.column = path, column

    def __call__(self, row: int) -> bytes:
        picture: bytes = self.column[row].as_py()
        return picture

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
        raise ValueError(f"{path}: labels outside 0..{len(names) - 1}, for which the file's metadata has names")
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


def _single(sets: dict[str, ImageSet]) -> ImageSet:
    return sets.get("all") or sets["train"]


def _open_at(opener: Callable[[int], Source], indices: Sequence[int], number: int) -> Source:
    return opener(indices[number])


def _find_part(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder or file for a part of the data; "Train" is as good as "train"."""
    entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    candidates = [name + suffix for name in names for suffix in ("", ".csv", ".parquet")]
    return next((entries[name] for name in candidates if name in entries), None)


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    """By number where all are numbers (so that 10 follows 9), else by name."""
    numeric = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
