"""Images of one class each in shards: tar files as WebDataset has them, here or elsewhere, opened by number.

An index says where in which shard each image lies, so that no shard has to be read from its beginning and every
image is met once an epoch. `write_shards` writes one beside its shards; for shards of others it is made by reading
the headers of the tar files, and kept.

A record is an image `KEY.jpg` (or `.jpeg`, `.png`, `.webp` ...) and `KEY.cls`, the number of its class as text, or
`KEY.json` with that number, or a name, as `label` or `cls`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilevit.data.folders import PART_NAMES, as_splits, find_parts, part_in
from mobilevit.data.imageset import ImageSet, Problem
from mobilevit.data.shard_files import (
    ShardError,
    ShardFile,
    ShardImages,
    describe,
    expand,
    folder_of,
    is_pattern,
    is_url,
    join,
    locked,
    name_of,
    open_shard,
    read_small,
)
from mobilevit.files import cache_folder, write_atomically
from mobilevit.imaging.decode import IMAGE_SUFFIXES
from mobilevit.progress import Progress

FORMAT = "mobilevit shards"
VERSION = 1
"""Of `index.json`; a reader refuses newer ones."""
INDEX = "index.json"
TABLE = "index.parquet"
KEPT_INDEX = ".mobilevit-index.parquet"
"""What was read from the headers of shards without an index."""
CLASSES = "classes.txt"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_COLUMNS = ("key", "label", "offset", "size", "extension")
_BLOCK = 512
"""Bytes that everything in a tar file is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class _Records:
    """What is in one shard, record by record."""

    shard: ShardFile
    keys: Sequence[str]
    labels: Sequence[str]
    """As they are written: a number, or a name; names where `named`."""
    offsets: NDArray[np.int64]
    """Where each image begins, in bytes."""
    sizes: NDArray[np.int64]
    """Length of each image in bytes."""
    extensions: Sequence[str]
    named: bool = False
    problems: list[Problem] = field(default_factory=list)

    def where(self, keep: Sequence[int], problems: Sequence[Problem]) -> _Records:
        """Some of the records, and more problems."""
        return replace(
            self,
            keys=[self.keys[i] for i in keep],
            labels=[self.labels[i] for i in keep],
            offsets=self.offsets[list(keep)],
            sizes=self.sizes[list(keep)],
            extensions=[self.extensions[i] for i in keep],
            problems=[*self.problems, *problems],
        )


# -- finding ----------------------------------------------------------------------------------------------------------


def is_elsewhere_or_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether this is no local path but the URL of shards, or a pattern of their names."""
    return is_url(path) or (not Path(path).exists() and is_pattern(path) and ".t" in name_of(os.fspath(path)))


def holds_shards(path: Path) -> bool:
    """Whether this is a shard or a folder of shards, perhaps one of parts; only names are looked at."""
    if path.is_file():
        return path.name.lower().endswith(_TAR_SUFFIXES)
    return path.is_dir() and (_has_shards(path) or any(map(_has_shards, find_parts(path).values())))


def _has_shards(folder: Path) -> bool:
    if _is_ours(folder / INDEX):
        return True
    # Beside folders of images, a tar file is what they were unpacked from.
    visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(map(_is_tar, visible)) and not any(entry.is_dir() for entry in visible)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(_TAR_SUFFIXES) and path.is_file()


def _is_ours(index: Path) -> bool:
    """Judged by its beginning: other tools have an index.json, too."""
    if not index.is_file():
        return False
    with index.open("rb") as file:
        return FORMAT.encode() in file.read(200)


def shard_splits(path: str | os.PathLike[str]) -> dict[str, ImageSet[int]]:
    """Read shards, given as a folder, one file, a pattern, or a URL of any of these.

    Folders may have sub-folders for parts (`train`, `val`, `test`), or all names of their shards may say the part, as
    in `train-000000.tar`, `val-000000.tar`. Classes are those of the index or of a `classes.txt` beside the shards or
    one folder above, else the numbers or names found.

    Whatever is wrong with single records is in the `problems` of the sets; they are left out.

    Returns:
        {"train": ..., "val": ..., "test": ...}, as far as the data are divided, else {"all": ...}.

    Raises:
        ValueError: nothing there, no tar file, no labels, a newer index, or an endpoint that fails.
    """
    place = os.fspath(path)
    places = {part: shards for part, shards in _find(place).items() if shards}
    if not places:
        raise ShardError(f"{place}: no shards there; it needs an {INDEX}, or files that end in .tar")
    sets = {part: _read(place, shards) for part, shards in places.items()}
    first = next(iter(sets.values()))
    return as_splits({part: data.relabel(first.classes) for part, data in sets.items()})


def _find(place: str) -> dict[str, list[str]]:
    """Paths or URLs of the shards of each part."""
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
        return [join(folder, shard["name"]) for shard in index["shards"]]
    if not is_url(folder):
        return [str(entry) for entry in sorted(Path(folder).iterdir()) if _is_tar(entry)]
    try:
        return expand(join(folder, "*.tar"))
    except ShardError as error:
        if "matches no file" in str(error):
            return []
        raise


def _by_name(places: list[str]) -> dict[str, list[str]]:
    """Divide shards whose names say their parts."""
    parts: dict[str, list[str]] = {}
    for place in places:
        parts.setdefault(part_in(name_of(place)) or "all", []).append(place)
    if "all" in parts and len(parts) > 1:
        named = next(shards[0] for part, shards in parts.items() if part != "all")
        raise ShardError(
            f"{parts['all'][0]}: its name says no part, but that of {name_of(named)} does; name all or none"
        )
    return parts


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(origin: str, places: Sequence[str]) -> ImageSet[int]:
    classes: list[str] | None = None
    by_place: dict[str, _Records] = {}
    for folder in dict.fromkeys(map(folder_of, places)):
        inside = [place for place in places if folder_of(place) == folder]
        index = _read_index(folder)
        if index is not None:
            classes = classes or index["classes"]
            by_place |= _read_table(folder, index, set(inside))
            inside = [place for place in inside if place not in by_place]
        else:
            classes = classes or _read_classes(folder) or _read_classes(folder_of(folder))
        by_place |= _read_headers(folder, inside)
    found = [_cut(by_place[place]) for place in dict.fromkeys(places)]
    if classes is None:
        names = _classes_of(found)
        known = {name: name for name in names}
    else:
        names = tuple(classes)
        known = {**{name: name for name in names}, **{str(number): name for number, name in enumerate(names)}}
    return _image_set(origin, [_with_known_labels(records, names, known) for records in found], names)


def _image_set(origin: str, found: Sequence[_Records], classes: tuple[str, ...]) -> ImageSet[int]:
    ends = np.cumsum([0, *(len(records.keys) for records in found)]).tolist()
    # Of shards that are cut short first: they stand for many images.
    problems = sorted((p for records in found for p in records.problems), key=lambda p: p.kind != _CUT)
    if not ends[-1]:
        why = f"; {problems[0]}" if problems else ""
        raise ShardError(f"{origin}: no record with an image (.jpg, .png, .webp) and a label (.cls, .json){why}")
    index_of = {name: index for index, name in enumerate(classes)}
    return ImageSet(
        task="classification",
        origin=origin,
        names=[
            f"{records.shard.name}/{key}.{extension}"
            for records in found
            for key, extension in zip(records.keys, records.extensions, strict=True)
        ],
        targets=[index_of[label] for records in found for label in records.labels],
        classes=classes,
        open=ShardImages(
            [records.shard for records in found],
            np.repeat(np.arange(len(found), dtype=np.int32), np.diff(ends)),
            np.concatenate([records.offsets for records in found]),
            np.concatenate([records.sizes for records in found]),
        ),
        problems=tuple(problems),
        shards=[range(start, stop) for start, stop in itertools.pairwise(ends) if stop > start],
    )


_CUT = "shard cut short"


def _cut(records: _Records) -> _Records:
    """Without the images that a local file, shorter than its index says, no longer has."""
    shard = records.shard
    if is_url(shard.place) or shard.num_bytes is None:
        return records
    try:
        size = Path(shard.place).stat().st_size
    except OSError:
        raise ShardError(f"{shard.place}: no such shard, though the index names it; copy it, too") from None
    if size >= shard.num_bytes:
        return records
    keep = np.flatnonzero(records.offsets + records.sizes <= size).tolist()
    lost = len(records.keys) - len(keep)
    return records.where(keep, [_cut_short(shard.place, f"{shard.num_bytes - size:,} bytes are missing", lost)])


def _cut_short(place: str, detail: str, lost: int) -> Problem:
    what = f"its last {lost} images are left out" if lost else "what is whole is used"
    return Problem(file=place, kind=_CUT, detail=detail, remedy=f"{what}; copy the shard again")


def _classes_of(found: Sequence[_Records]) -> tuple[str, ...]:
    """The numbers that occur, or all labels if some are names."""
    labels = {label for records in found for label in records.labels}
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(str(number) for number in sorted({int(label) for label in labels}) if number >= 0)
    return tuple(sorted(labels))


def _with_known_labels(records: _Records, classes: tuple[str, ...], known: dict[str, str]) -> _Records:
    """Labels as names of classes; without the records whose label is none."""
    if records.named:
        known = {name: name for name in classes}
    labels = [known.get(label) or known.get(_plain_number(label)) for label in records.labels]
    keep = [number for number, label in enumerate(labels) if label is not None]
    unknown = [
        Problem(
            file=f"{records.shard.place}: {records.keys[number]}",
            kind="label outside the classes",
            detail=f"{records.labels[number]}; there are {len(classes)} classes",
            remedy=f"left out; add its name to {CLASSES}, a line each, or correct it",
        )
        for number, label in enumerate(labels)
        if label is None
    ]
    if not unknown:
        return replace(records, labels=[label for label in labels if label is not None])
    return replace(records.where(keep, unknown), labels=[label for label in labels if label is not None])


def _plain_number(label: str) -> str:
    return str(int(label)) if label.isdecimal() else label


def _read_classes(folder: str) -> list[str] | None:
    data = read_small(join(folder, CLASSES)) if folder else None
    if data is None:
        return None
    names = [line.strip() for line in data.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise ShardError(f"{join(folder, CLASSES)}: names a class twice; give each a name of its own")
    return names


# -- our own index ----------------------------------------------------------------------------------------------------


def _read_index(folder: str) -> dict[str, Any] | None:
    """`index.json` of a folder, if it has one that `write_shards` wrote.

    Raises:
        ShardError: damaged, or of a newer version.
    """
    place = join(folder, INDEX)
    data = read_small(place)
    if data is None or FORMAT.encode() not in data[:200]:
        return None
    try:
        index: dict[str, Any] = json.loads(data)
        version, shards = int(index["version"]), index["shards"]
        if version <= VERSION:
            index["classes"] = [str(name) for name in index["classes"]]
            index["shards"] = [{"name": s["name"], "bytes": s["bytes"], "sha256": s["sha256"]} for s in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{place}: damaged ({type(error).__name__}: {error}); copy it again") from None
    if version > VERSION:
        raise ShardError(f"{place}: version {version} is of a newer mobilevit, this one reads {VERSION}; update it")
    return index


def _read_table(folder: str, index: dict[str, Any], wanted: set[str]) -> dict[str, _Records]:
    place = join(folder, TABLE)
    data = read_small(place)
    if data is None:
        raise ShardError(f"{place}: missing, though {INDEX} is there; copy it, too")
    table = _parse_parquet(place, data, ("shard", *_COLUMNS))
    shard_of = table["shard"].to_numpy()
    result = {}
    for number, shard in enumerate(index["shards"]):
        file = ShardFile(place=join(folder, shard["name"]), num_bytes=shard["bytes"], version=shard["sha256"])
        if file.place in wanted:
            first, stop = np.searchsorted(shard_of, [number, number + 1]).tolist()
            rows = table.slice(first, stop - first)
            # Numbers into the classes; names only once all is known.
            labels = [index["classes"][label] for label in rows["label"].to_pylist()]
            result[file.place] = replace(_records(file, rows), labels=labels, named=True)
    return result


def _parse_parquet(place: str, data: bytes | None, columns: Sequence[str]) -> Any:
    pq = parquet(place)
    import pyarrow as pa

    try:
        table = pq.read_table(place if data is None else pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{place}: damaged ({str(error).splitlines()[0]}); copy it again") from None
    if missing := set(columns) - set(table.column_names):
        raise ShardError(f"{place}: no column {' and '.join(sorted(missing))}; copy it again")
    return table


def parquet(place: str) -> Any:
    """`pyarrow.parquet`.

    Raises:
        ShardError: it is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ShardError(f"{place}: an index of shards needs pyarrow; pip install 'mobilevit[train]'") from None
    return pq


def _records(shard: ShardFile, rows: Any, problems: list[Problem] | None = None) -> _Records:
    return _Records(
        shard=shard,
        keys=rows["key"].to_pylist(),
        labels=[str(label) for label in rows["label"].to_pylist()],
        offsets=rows["offset"].to_numpy(),
        sizes=rows["size"].to_numpy(),
        extensions=rows["extension"].to_pylist(),
        problems=problems or [],
    )


# -- shards without an index ------------------------------------------------------------------------------------------


def _read_headers(folder: str, places: Sequence[str]) -> dict[str, _Records]:
    """What is in shards without an index: as kept from the last time, else from the headers of the tar files."""
    if not places:
        return {}
    parquet(folder)
    with locked(f"index of {folder}"):
        kept = _load_kept(folder)
        result, new = {}, False
        missing = [place for place in places if place not in kept or not is_url(place)]
        try:
            with Progress(f"headers of {name_of(folder)}", len(places), "shards", silent=not missing) as progress:
                for place in places:
                    shard = describe(place)
                    known = kept.get(place)
                    if known is None or known.shard != shard:
                        with _opened(shard) as file:
                            known = _scan(file, shard)
                        kept[place], new = known, True
                    result[place] = known
                    progress.advance(1)
        finally:  # what was read stays read if it is interrupted
            if new:
                _keep(folder, kept)
    return result


def _opened(shard: ShardFile) -> FileIO:
    try:
        return open_shard(shard)
    except OSError as error:
        raise ShardError(f"{shard.place}: cannot be read ({error.strerror}); look at its permissions") from None


def _scan(file: FileIO, shard: ShardFile) -> _Records:
    """Read the headers of one tar file and the labels in it; images are passed over.

    Raises:
        ShardError: no tar file, or a compressed one.
    """
    problems: list[Problem] = []
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, str] = {}
    size = file.seek(0, os.SEEK_END)
    last, needed = "", 0
    for member in _members(file, shard):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        base, _, extension = base.partition(".")
        key, extension = _text(folder + slash + base), _text(extension.lower())
        last, needed = key, member.offset_data + member.size
        if needed > size:
            break
        if extension in ("cls", "json"):
            file.seek(member.offset_data)
            label = _label(file.read(member.size) or b"", extension)
            if label is None:
                problems.append(_problem(shard, key, f"label in .{extension} that cannot be read"))
            elif extension == "cls" or key not in labels:
                labels[key] = label
        elif f".{extension}" in IMAGE_SUFFIXES:
            if key in images and images[key][2] == extension:
                problems.append(_problem(shard, key, "key that comes twice"))
            else:
                images.setdefault(key, (member.offset_data, member.size, extension))
    else:
        last, needed = (last, size + _BLOCK) if not _ends_well(file) else ("", 0)
    told = {problem.file for problem in problems}
    whole = [key for key in images if key in labels]
    for key in sorted(set(images) ^ set(labels)):
        what = "record without a label" if key in images else "record without an image"
        if key != last and f"{shard.place}: {key}" not in told:
            problems.append(_problem(shard, key, what))
    if needed:
        problems.insert(0, _cut_short(shard.place, f"at least {needed - size:,} bytes are missing", 0))
    rows = [images[key] for key in whole]
    return _Records(
        shard=shard,
        keys=whole,
        labels=[labels[key] for key in whole],
        offsets=np.array([offset for offset, _, _ in rows], np.int64),
        sizes=np.array([length for _, length, _ in rows], np.int64),
        extensions=[extension for _, _, extension in rows],
        problems=problems,
    )


def _members(file: FileIO, shard: ShardFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file, as far as their headers can be read; then the position is behind the last one."""
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, our file is closed by who opened it
    except (tarfile.TarError, EOFError) as error:
        what = "shards are plain tar files, not compressed; unpack it with gunzip, or copy it again"
        raise ShardError(f"{shard.place}: no tar file ({error}); {what}") from None
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all otherwise
            if member.isfile():
                yield member
    except (tarfile.TarError, EOFError):
        pass  # cut short
    file.seek(tar.offset)


def _ends_well(file: FileIO) -> bool:
    """Whether the end mark of a tar file, a block of zeros, comes now."""
    return file.read(_BLOCK) == bytes(_BLOCK)


def _label(data: bytes, extension: str) -> str | None:
    try:
        if extension == "cls":
            return str(int(data))
        values = json.loads(data)
        label = values.get("label", values.get("cls"))
    except (ValueError, AttributeError):
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label) if isinstance(label, int | str) and not isinstance(label, bool) and label != "" else None


def _problem(shard: ShardFile, key: str, kind: str) -> Problem:
    return Problem(file=f"{shard.place}: {key}", kind=kind, remedy="left out")


def _text(name: str) -> str:
    """Without what cannot be UTF-8."""
    return name.encode(errors="replace").decode()


def _kept_places(folder: str) -> list[Path]:
    """Where the index of a folder is kept: in it, or, where that cannot be written, with the user's caches."""
    digest = hashlib.sha256((folder if is_url(folder) else str(Path(folder).absolute())).encode()).hexdigest()[:16]
    elsewhere = cache_folder() / "shard-indexes" / f"{digest}.parquet"
    return [elsewhere] if is_url(folder) else [Path(folder) / KEPT_INDEX, elsewhere]


def _keep(folder: str, kept: dict[str, _Records]) -> None:
    pq = parquet(folder)
    import pyarrow as pa

    found = list(kept.values())
    table = pa.table(
        {
            "shard": pa.array(np.repeat(np.arange(len(found)), [len(records.keys) for records in found]), pa.int32()),
            "key": pa.array([key for records in found for key in records.keys], pa.string()),
            "label": pa.array([label for records in found for label in records.labels], pa.string()),
            "offset": np.concatenate([records.offsets for records in found]),
            "size": np.concatenate([records.sizes for records in found]),
            "extension": pa.array([extension for records in found for extension in records.extensions], pa.string()),
        }
    )
    told = [
        {**vars(r.shard), "records": len(r.keys), "problems": [vars(problem) for problem in r.problems]} for r in found
    ]
    table = table.replace_schema_metadata({FORMAT: json.dumps({"version": VERSION, "shards": told})})
    for path in _kept_places(folder):
        try:
            write_atomically(path, lambda aside: pq.write_table(table, aside))
        except OSError:
            continue  # it will be read anew the next time
        return


def _load_kept(folder: str) -> dict[str, _Records]:
    for path in _kept_places(folder):
        if path.is_file():
            try:
                table = _parse_parquet(str(path), None, ("shard", *_COLUMNS))
                told = json.loads(table.schema.metadata[FORMAT.encode()])
                if told["version"] == VERSION:
                    return _kept(folder, table, told["shards"])
            except (ShardError, KeyError, ValueError, TypeError):
                pass  # damaged: read anew
    return {}


def _kept(folder: str, table: Any, shards: list[dict[str, Any]]) -> dict[str, _Records]:
    result, first = {}, 0
    for shard in shards:
        # The folder may have moved since, with the index in it.
        place = join(folder, shard["place"].rpartition("/")[2]) if not is_url(folder) else shard["place"]
        file = ShardFile(place=place, num_bytes=shard["num_bytes"], version=shard["version"])
        rows = table.slice(first, shard["records"])
        problems = [Problem(**{**p, "file": p["file"].replace(shard["place"], place, 1)}) for p in shard["problems"]]
        result[place] = _records(file, rows, problems)
        first += shard["records"]
    return result
