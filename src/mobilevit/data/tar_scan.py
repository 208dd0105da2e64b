"""Find the labeled images in tar files without an index, by their headers; the result is kept for the next time.

A record is an image `KEY.jpg` (or `.jpeg`, `.png`, `.webp` ...) and `KEY.cls`, the number of its class as text, or
`KEY.json` with that number, or a name, as `label` or `cls`.
"""

from __future__ import annotations

import json
import os
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mobilevit.data.imageset import Problem
from mobilevit.data.shard_files import ShardFile, describe, digest, open_shard, read_range
from mobilevit.errors import MobileViTError
from mobilevit.files import WriteError, cache_folder, write_text
from mobilevit.imaging.decode import IMAGE_SUFFIXES
from mobilevit.remote import is_url

BLOCK = 512
"""Bytes that everything in a tar file is a multiple of."""
CUT_SHORT = "shard cut short"


@dataclass(frozen=True, kw_only=True)
class Records:
    """The labeled images of one shard, and what is wrong in it."""

    shard: ShardFile
    names: list[str]
    """KEY.EXTENSION of each image."""
    labels: list[str]
    """As they are written: a number, or a name."""
    offsets: NDArray[np.int64]
    """Offset of each image in bytes."""
    sizes: NDArray[np.int64]
    """Length of each image in bytes."""
    problems: list[Problem] = field(default_factory=list)

    def keep(self, rows: list[int], problems: list[Problem]) -> Records:
        """Return some of the records, and more problems."""
        return Records(
            shard=self.shard,
            names=[self.names[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            problems=self.problems + problems,
        )


def cut_short(place: str, detail: str, lost: int = 0) -> Problem:
    """Describe a shard that ends too early."""
    what = f"its last {lost} images are left out" if lost else "what is whole is used"
    return Problem(file=place, kind=CUT_SHORT, detail=detail, remedy=f"{what}; copy the shard again")


def read_records(place: str) -> Records:
    """Return what was found in a tar file the last time, unless it has changed since; else read its headers.

    Raises:
        MobileViTError: no such file, no tar file, or a compressed one.
    """
    shard = describe(place)
    where = place if is_url(place) else str(Path(place).absolute())
    kept = cache_folder() / "shard-indexes" / f"{digest(f'{where} {shard.version}')}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one: read the headers
        return _from_json(shard, kept.read_text(encoding="utf-8"))
    try:
        stream = open_shard(shard)
    except OSError as error:
        raise MobileViTError(f"{place}: cannot be read ({error.strerror}); look at its permissions") from None
    with stream:
        records = _scan(stream, shard)
    with suppress(WriteError):  # nowhere to write: it is read again the next time
        write_text(kept, _to_json(records))
    return records


def _to_json(records: Records) -> str:
    return json.dumps(
        {
            "names": records.names,
            "labels": records.labels,
            "offsets": records.offsets.tolist(),
            "sizes": records.sizes.tolist(),
            "problems": [vars(problem) for problem in records.problems],
        }
    )


def _from_json(shard: ShardFile, text: str) -> Records:
    values = json.loads(text)
    return Records(
        shard=shard,
        names=values["names"],
        labels=values["labels"],
        offsets=np.array(values["offsets"], np.int64),
        sizes=np.array(values["sizes"], np.int64),
        problems=[Problem(**problem) for problem in values["problems"]],
    )


def _scan(stream: FileIO, shard: ShardFile) -> Records:
    problems: list[Problem] = []
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    total = stream.seek(0, os.SEEK_END)
    members, end = _members(stream, shard)
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
                problems.append(_left_out(shard, key, f"label in .{extension} that cannot be read"))
            elif extension == "cls" or key not in labels:
                labels[key] = label
        elif f".{extension}" in IMAGE_SUFFIXES:
            if key in images and images[key][0] == extension:
                problems.append(_left_out(shard, key, "key that comes twice"))
            else:
                images.setdefault(key, (extension, offset, size))
    is_whole = read_range(stream, end, BLOCK) == bytes(BLOCK)  # the end mark
    reported = {problem.file for problem in problems}
    for key in sorted(images.keys() ^ labels.keys()):
        what = "record without a label" if key in images else "record without an image"
        if f"{shard.place}: {key}" not in reported and (is_whole or key != last):
            problems.append(_left_out(shard, key, what))
    if not is_whole:
        missing = end + BLOCK - total
        detail = f"at least {missing:,} bytes are missing" if missing > 0 else f"damaged at byte {end:,}"
        problems.insert(0, cut_short(shard.place, detail))
    found = {key: images[key] for key in images if key in labels}
    return Records(
        shard=shard,
        names=[f"{key}.{extension}" for key, (extension, _, _) in found.items()],
        labels=[labels[key] for key in found],
        offsets=np.array([offset for _, offset, _ in found.values()], np.int64),
        sizes=np.array([size for _, _, size in found.values()], np.int64),
        problems=problems,
    )


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


def _left_out(shard: ShardFile, key: str, kind: str) -> Problem:
    return Problem(file=f"{shard.place}: {key}", kind=kind, remedy="left out")
