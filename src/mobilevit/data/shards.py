"""Images of one class each in shards: tar files in WebDataset's format, local or remote, opened by number.

An index says in which shard and where each image lies, so that no shard has to be read from its beginning and every
image is met once an epoch. `write_shards` writes one beside its shards; for tar files of others, `tar_scan` makes it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mobilevit.data.folders import PART_NAMES, as_splits, find_parts, part_in
from mobilevit.data.imageset import ImageSet, Problem
from mobilevit.data.shard_files import (
    ShardFile,
    ShardImages,
    expand,
    folder_of,
    is_pattern,
    join,
    list_matches,
    name_of,
    read_small,
)
from mobilevit.data.tar_scan import CUT_SHORT, Contents, Record, cut_short, read_contents
from mobilevit.errors import MobileViTError, one_line
from mobilevit.progress import Progress
from mobilevit.remote import is_url
from mobilevit.runtime.engine import import_runtime
from mobilevit.tasks.classification import CLASSIFICATION

FORMAT = "mobilevit shards"
VERSION = 1
"""Version of `index.json`; newer ones are refused."""
INDEX = "index.json"
TABLE = "index.parquet"
CLASSES = "classes.txt"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


# -- finding ----------------------------------------------------------------------------------------------------------


def holds_shards(path: Path) -> bool:
    """Whether this is a shard or a folder of shards, perhaps one of parts; only names are looked at."""
    return _is_tar(path) or (path.is_dir() and any(map(_has_shards, (path, *find_parts(path).values()))))


def _has_shards(folder: Path) -> bool:
    index = folder / INDEX
    if index.is_file():
        with index.open("rb") as file:  # other tools have an index.json, too
            if FORMAT.encode() in file.read(200):
                return True
    # Beside folders of images, a tar file is what they were unpacked from.
    visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(map(_is_tar, visible)) and not any(entry.is_dir() for entry in visible)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(_TAR_SUFFIXES) and path.is_file()


def shard_splits(path: str | os.PathLike[str]) -> dict[str, ImageSet[int]]:
    """Read shards, given as a folder, one file, a pattern, or a URL of any of these.

    Folders may have sub-folders for parts (`train`, `val`, `test`), or the names of all their shards say the part, as
    in `train-000000.tar`, `val-000000.tar`. Classes are those of the index or of a `classes.txt` beside the shards or
    one folder above, else the numbers or names found.

    Whatever is wrong with single records is in the `problems` of the sets; they are left out.

    Raises:
        MobileViTError: nothing there, no tar file, no labels, a newer index, or a server that fails.
    """
    place = os.fspath(path)
    places = {part: shards for part, shards in _find(place).items() if shards}
    if not places:
        raise MobileViTError(f"{place}: no shards there; it needs an {INDEX}, or files that end in .tar")
    sets = {part: _read(place, shards) for part, shards in places.items()}
    first = next(iter(sets.values()))
    return as_splits({part: data.relabel(first.classes) for part, data in sets.items()})


def _find(place: str) -> dict[str, list[str]]:
    """List the paths or URLs of the shards of each part."""
    if is_pattern(place) and not Path(place).exists():
        return _by_name(expand(place))
    if name_of(place).lower().endswith(_TAR_SUFFIXES):
        return {"all": [place]}
    if found := _in_folder(place):
        return _by_name(found)
    if is_url(place):
        return {part: _in_folder(join(place, part)) for part in PART_NAMES}
    return {part: _in_folder(str(folder)) for part, folder in find_parts(Path(place)).items()}


def _in_folder(folder: str) -> list[str]:
    index = _read_index(folder)
    if index is not None:
        return [shard.place for shard in index[1]]
    if is_url(folder):
        return list_matches(join(folder, "*.tar"))
    return [str(entry) for entry in sorted(Path(folder).iterdir()) if _is_tar(entry)]


def _by_name(places: list[str]) -> dict[str, list[str]]:
    """Divide shards whose names say their parts."""
    parts: dict[str, list[str]] = {}
    for place in places:
        parts.setdefault(part_in(name_of(place)) or "all", []).append(place)
    if "all" in parts and len(parts) > 1:
        named = next(shards[0] for part, shards in parts.items() if part != "all")
        raise MobileViTError(
            f"{parts['all'][0]}: its name says no part, but that of {name_of(named)} does; name all or none"
        )
    return parts


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(origin: str, places: Sequence[str]) -> ImageSet[int]:
    places = list(dict.fromkeys(places))
    classes: list[str] | None = None
    indexed: dict[str, Contents] = {}
    for folder in dict.fromkeys(map(folder_of, places)):
        index = _read_index(folder)
        if index is not None:
            classes = classes or index[0]
            indexed |= _read_table(folder, *index, {*places})
        else:
            classes = classes or _read_classes(folder) or _read_classes(folder_of(folder))
    scanned: dict[str, Contents] = {}
    foreign = [place for place in places if place not in indexed]
    with Progress("read headers", len(foreign), "shards", silent=not foreign) as progress:
        for place in foreign:
            scanned[place] = read_contents(place)
            progress.advance(1)
    numbers = {str(number): name for number, name in enumerate(classes or [])}
    classes = classes or _classes_of([*indexed.values(), *scanned.values()])
    by_name = {name: name for name in classes}
    # An index has the names of the classes; in a tar file, "3" is class number 3, even where a class is called so.
    found = {place: _with_known_labels(contents, by_name) for place, contents in indexed.items()}
    found |= {place: _with_known_labels(contents, by_name | numbers) for place, contents in scanned.items()}
    return _image_set(origin, [found[place] for place in places], tuple(classes))


def _image_set(origin: str, found: Sequence[Contents], classes: tuple[str, ...]) -> ImageSet[int]:
    ends = list(itertools.accumulate((len(contents.records) for contents in found), initial=0))
    records = [record for contents in found for record in contents.records]
    # Shards that are cut short first: they stand for many images.
    problems = sorted((p for contents in found for p in contents.problems), key=lambda p: p.kind != CUT_SHORT)
    if not records:
        why = f"; {problems[0]}" if problems else ""
        raise MobileViTError(f"{origin}: no record with an image (.jpg, .png, .webp) and a label (.cls, .json){why}")
    index_of = {name: index for index, name in enumerate(classes)}
    return ImageSet(
        task=CLASSIFICATION,
        origin=origin,
        names=[f"{name_of(contents.shard.place)}/{record.name}" for contents in found for record in contents.records],
        targets=[index_of[record.label] for record in records],
        classes=classes,
        open=ShardImages(
            [contents.shard for contents in found],
            np.repeat(np.arange(len(found), dtype=np.int32), np.diff(ends)),
            np.array([record.offset for record in records], np.int64),
            np.array([record.size for record in records], np.int64),
        ),
        problems=tuple(problems),
        shards=[range(start, stop) for start, stop in itertools.pairwise(ends) if stop > start],
    )


def _classes_of(found: Sequence[Contents]) -> list[str]:
    """Return the numbers that occur, or all labels if some are names."""
    labels = {record.label for contents in found for record in contents.records}
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return [str(number) for number in sorted({int(label) for label in labels}) if number >= 0]
    return sorted(labels)


def _with_known_labels(contents: Contents, known: Mapping[str, str]) -> Contents:
    """Replace labels by names of classes, and leave out the records whose label is none."""
    records, problems = [], [*contents.problems]
    for record in contents.records:
        plain = str(int(record.label)) if record.label.isdecimal() else record.label  # without leading zeros
        name = known.get(record.label) or known.get(plain)
        if name is not None:
            records.append(record._replace(label=name))
            continue
        where = f"{contents.shard.place}: {record.name.rpartition('.')[0]}"
        detail = f"{record.label}; there are {len({*known.values()})} classes"
        remedy = f"left out; add its name to {CLASSES}, a line each, or correct it"
        problems.append(Problem(where, "label outside the classes", detail, remedy))
    return Contents(shard=contents.shard, records=records, problems=problems)


def _read_classes(folder: str) -> list[str] | None:
    data = read_small(join(folder, CLASSES)) if folder else None
    if data is None:
        return None
    names = [line.strip() for line in data.decode("utf-8-sig", errors="replace").rstrip().splitlines()]
    if "" in names or len(set(names)) < len(names):
        raise MobileViTError(f"{join(folder, CLASSES)}: names a class twice or not at all; write one a line")
    return names


# -- the index of `write_shards` ---------------------------------------------------------------------------------------


_Index = tuple[list[str], list[ShardFile]]
"""Classes and shards."""


def _read_index(folder: str) -> _Index | None:
    """Read `index.json` of a folder, if it has one that `write_shards` wrote."""
    place = join(folder, INDEX)
    data = read_small(place)
    if data is None or FORMAT.encode() not in data[:200]:
        return None
    try:
        index = json.loads(data)
        version = int(index["version"])
        if version <= VERSION:
            shards = [
                ShardFile(place=join(folder, shard["name"]), num_bytes=shard["bytes"], version=shard["sha256"])
                for shard in index["shards"]
            ]
            return [str(name) for name in index["classes"]], shards
    except (ValueError, KeyError, TypeError) as error:
        raise MobileViTError(f"{place}: damaged ({type(error).__name__}: {error}); copy it again") from None
    raise MobileViTError(f"{place}: version {version} is of a newer mobilevit, this one reads {VERSION}; update it")


def _read_table(folder: str, classes: list[str], shards: list[ShardFile], wanted: set[str]) -> dict[str, Contents]:
    """Read what `index.parquet` says of the wanted shards."""
    place = join(folder, TABLE)
    pq = import_runtime("pyarrow.parquet", "train")
    import pyarrow as pa

    data = read_small(place)
    if data is None:
        raise MobileViTError(f"{place}: missing, though {INDEX} is there; copy it, too")
    try:
        table = pq.read_table(pa.BufferReader(data))
        number_of = table["shard"].to_numpy()
        columns = [table[name] for name in ("key", "extension", "label", "offset", "size")]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise MobileViTError(f"{place}: damaged ({one_line(error)}); copy it again") from None
    result = {}
    for number, shard in enumerate(shards):
        if shard.place in wanted:
            first, stop = np.searchsorted(number_of, [number, number + 1]).tolist()
            rows = zip(*(column[first:stop].to_pylist() for column in columns), strict=True)
            records = [
                Record(f"{key}.{extension}", classes[label], offset, size)
                for key, extension, label, offset, size in rows
            ]
            result[shard.place] = _without_missing_end(shard, records)
    return result


def _without_missing_end(shard: ShardFile, records: list[Record]) -> Contents:
    """Leave out the images that a local file, shorter than its index says, no longer has."""
    size = shard.num_bytes
    if not is_url(shard.place):
        try:
            size = Path(shard.place).stat().st_size
        except OSError:
            raise MobileViTError(f"{shard.place}: no such shard, though the index names it; copy it, too") from None
    if size is None or shard.num_bytes is None or size >= shard.num_bytes:
        return Contents(shard=shard, records=records, problems=[])
    kept = [record for record in records if record.offset + record.size <= size]
    detail = f"{shard.num_bytes - size:,} bytes are missing"
    problems = [cut_short(shard.place, detail, lost=len(records) - len(kept))]
    return Contents(shard=shard, records=kept, problems=problems)
