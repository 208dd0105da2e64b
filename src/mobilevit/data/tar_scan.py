"""Find the labeled images in tar files without an index, by their headers; the result is kept for the next time.

A record is an image `KEY.jpg` (or `.jpeg`, `.png`, `.webp` ...) and `KEY.cls`, the number of its class as text, or
`KEY.json` with that number, or a name, as `label` or `cls`.
"""

from __future__ import annotations

import json
import os
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from mobilevit.data.imageset import Problem
from mobilevit.data.shard_files import ShardFile, describe, digest, open_shard, read_range
from mobilevit.errors import MobileViTError
from mobilevit.files import WriteError, cache_folder, write_text
from mobilevit.imaging.decode import IMAGE_SUFFIXES
from mobilevit.remote import is_url

CUT_SHORT = "shard cut short"


class Record(NamedTuple):
    """A labeled image in a shard."""

    name: str
    """KEY.EXTENSION"""
    label: str
    """As it is written: a number, or a name."""
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The labeled images of one shard, and what is wrong in it."""

    shard: ShardFile
    records: list[Record]
    problems: list[Problem]


def cut_short(place: str, detail: str, lost: int = 0) -> Problem:
    """Describe a shard that ends too early."""
    what = f"its last {lost} images are left out" if lost else "what is whole is used"
    return Problem(place, CUT_SHORT, detail, f"{what}; copy the shard again")


def read_contents(place: str) -> Contents:
    """Return what was found in a tar file the last time, unless it has changed since; else read its headers."""
    shard = describe(place)
    where = place if is_url(place) else str(Path(place).absolute())
    kept = cache_folder() / "shard-indexes" / f"{digest(f'{where} {shard.version}')}.json"
    with suppress(OSError, ValueError, TypeError):  # none, or a damaged one: read the headers
        records, problems = json.loads(kept.read_text(encoding="utf-8"))
        return Contents(
            shard=shard,
            records=[Record(*record) for record in records],
            problems=[Problem(**problem) for problem in problems],
        )
    try:
        stream = open_shard(shard)
    except OSError as error:
        raise MobileViTError(f"{place}: cannot be read ({error.strerror}); look at its permissions") from None
    with stream:
        contents = _scan(stream, shard)
    with suppress(WriteError):  # nowhere to write: it is read again the next time
        write_text(kept, json.dumps([contents.records, [vars(problem) for problem in contents.problems]]))
    return contents


def _scan(stream: FileIO, shard: ShardFile) -> Contents:
    problems: list[Problem] = []
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    total = stream.seek(0, os.SEEK_END)
    members, end = _members(stream, shard)

    def leave_out(key: str, kind: str) -> None:
        problems.append(Problem(f"{shard.place}: {key}", kind, remedy="left out"))

    last = ""
    for name, offset, size in members:
        folder, slash, base = name.removeprefix("./").rpartition("/")
        key, _, extension = base.partition(".")
        last = key = folder + slash + key
        extension = extension.lower()
        if offset + size > total:
            continue  # the file is cut off here
        if extension in ("cls", "json"):
            label = _label(read_range(stream, offset, size), extension)
            if label is None:
                leave_out(key, f"label in .{extension} that cannot be read")
            elif extension == "cls" or key not in labels:
                labels[key] = label
        elif f".{extension}" in IMAGE_SUFFIXES:
            if key in images and images[key][0] == extension:
                leave_out(key, "key that comes twice")
            else:
                images.setdefault(key, (extension, offset, size))
    is_whole = read_range(stream, end, tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # the end mark
    reported = {problem.file for problem in problems}
    for key in sorted(images.keys() ^ labels.keys()):
        if f"{shard.place}: {key}" not in reported and (is_whole or key != last):
            leave_out(key, "record without a label" if key in images else "record without an image")
    if not is_whole:
        missing = end + tarfile.BLOCKSIZE - total
        detail = f"at least {missing:,} bytes are missing" if missing > 0 else f"damaged at byte {end:,}"
        problems.insert(0, cut_short(shard.place, detail))
    records = [
        Record(f"{key}.{extension}", labels[key], offset, size)
        for key, (extension, offset, size) in images.items()
        if key in labels
    ]
    return Contents(shard=shard, records=records, problems=problems)


def _members(stream: FileIO, shard: ShardFile) -> tuple[list[tuple[str, int, int]], int]:
    """Read name, offset and length of the files in a tar file, as far as it is whole, and the end of the last one."""
    stream.seek(0)
    found = []
    try:
        tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115, whoever opened our file closes it
    except (tarfile.TarError, EOFError) as error:
        what = "shards are plain tar files, not compressed; unpack it with gunzip, or copy it again"
        raise MobileViTError(f"{shard.place}: no tar file ({error}); {what}") from None
    with suppress(tarfile.TarError, EOFError):  # cut short
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all otherwise
            if member.isfile():
                name = member.name.encode(errors="replace").decode()  # without what cannot be UTF-8
                found.append((name, member.offset_data, member.size))
    return found, tar.offset


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
