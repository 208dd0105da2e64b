"""Pack labeled images into shards with an index; `shards.py` reads them."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevit.card import Task
from mobilevit.data.datasets import find_splits
from mobilevit.data.folders import PART_NAMES
from mobilevit.data.imageset import ImageSet, check_classes, split
from mobilevit.data.shard_files import ShardError
from mobilevit.data.shards import FORMAT, INDEX, TABLE, VERSION, parquet
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.files import write_atomically, write_json
from mobilevit.imaging.decode import read_image
from mobilevit.progress import Progress

_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp",
    "GIF": "gif", "TIFF": "tif", "PPM": "ppm", "AVIF": "avif",
}  # fmt: skip
_JPEG_QUALITY = 95
_READ_AHEAD = 64
"""Images that are read, and checked, before they are written."""
_BLOCK = 512
"""Bytes that everything in a tar file is a multiple of."""
_OURS = re.compile(rf"({'|'.join(PART_NAMES)})-\d{{6,}}\.tar|{re.escape(INDEX)}|{re.escape(TABLE)}")


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What `write_shards` wrote."""

    out: str
    shards: int
    images: int
    num_bytes: int
    left_out: tuple[str, ...]
    """One line for each image that cannot be read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.out}: {self.images:,} images in {self.shards} shards, {self.num_bytes / 1e6:,.1f} MB"]
        if self.left_out:
            lines += [f"left out {len(self.left_out)} images, which cannot be read:"]
            lines += [f"  {line}" for line in self.left_out[:10]]
            lines += [f"  and {len(self.left_out) - 10} more"] if len(self.left_out) > 10 else []
        return lines


@dataclass(frozen=True, kw_only=True)
class _Image:
    """Ready to be written."""

    number: int
    data: bytes
    extension: str


def write_shards(
    data: str | os.PathLike[str],
    out: Path,
    *,
    task: Task | None = None,
    max_bytes: int = 256_000_000,
    shorter_side: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ShardReport:
    """Write the images at `data` as shards, shuffled once, so that each shard is a mix of the classes.

    Divided data become a sub-folder a part. Nothing is seen in `out` before all of it is written, except a hidden
    folder that goes with an error or Ctrl-C.

    Args:
        data: what `find_splits` reads.
        out: folder; empty, or none yet.
        task: as of `find_splits`.
        max_bytes: of a shard; one with a single larger image passes it.
        shorter_side: larger images are made this small, in pixels, and JPEG; None copies their bytes.
        val_fraction: share of each class for a val part, of data that are not divided; None leaves them so.
        seed: decides order and parts.
        overwrite: replace shards written before.

    Raises:
        ValueError: not for classification, `out` has something else in it, or a number out of range.
    """
    if max_bytes < 1:
        raise MobileViTError(f"--max-mb is {max_bytes / 1e6:g}; it must be above 0")
    if shorter_side is not None and shorter_side < 32:
        raise MobileViTError(f"--shorter-side is {shorter_side}; it must be 32 or more")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise MobileViTError(f"--val-fraction is {val_fraction}; it must be between 0 and 1")
    parquet(str(out))
    _refuse_if_used(out, overwrite)
    splits = find_splits(data, task)
    if any(part.task != "classification" for part in splits.values()):
        raise MobileViTError(
            f"{data}: is labeled for {next(iter(splits.values())).task}; shards are for classification"
        )
    if val_fraction is not None and "all" in splits:
        check_classes(splits["all"])
        train, val = split(splits["all"], val_fraction=val_fraction, seed=seed)
        splits = {"train": train, "val": val}
    out.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out, prefix=".writing-"))
    left_out: list[str] = []
    indexes = []
    try:
        for part, images in splits.items():
            folder = aside if part == "all" else aside / part
            name = "train" if part == "all" else part
            indexes.append(_write_part(images, folder, name, max_bytes, shorter_side, seed, left_out))
        _remove_former(out)
        for folder in [aside / part for part in splits if part != "all"] or [aside]:
            there = out if folder == aside else out / folder.name
            there.mkdir(exist_ok=True)
            # The index last: it makes the folder what it is.
            for file in sorted(folder.iterdir(), key=lambda file: file.name == INDEX):
                file.replace(there / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shards = [shard for index in indexes for shard in index["shards"]]
    return ShardReport(
        out=str(out),
        shards=len(shards),
        images=sum(shard["images"] for shard in shards),
        num_bytes=sum(shard["bytes"] for shard in shards),
        left_out=tuple(left_out),
    )


def _refuse_if_used(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise MobileViTError(f"{out}: is a file; --out names a folder")
    used = [entry for entry in _entries(out) if not entry.name.startswith(".")]
    if others := [entry for entry in used if not _is_former(entry)]:
        raise MobileViTError(f"{out}: holds {others[0].name}, which is no shard of ours; choose an empty folder")
    if used and not overwrite:
        raise MobileViTError(f"{out}: already holds shards; choose another --out, or replace them with --overwrite")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_former(entry: Path) -> bool:
    """Whether an earlier call wrote it."""
    if entry.is_dir():
        inside = [file for file in entry.iterdir() if not file.name.startswith(".")]
        return entry.name in PART_NAMES and all(_OURS.fullmatch(file.name) for file in inside)
    return _OURS.fullmatch(entry.name) is not None


def _remove_former(out: Path) -> None:
    """Indexes first: without them, what is left is not taken for whole."""
    files = [
        file for folder in (out, *(out / part for part in PART_NAMES)) for file in _entries(folder) if file.is_file()
    ]
    for file in sorted(files, key=lambda file: file.name != INDEX):
        if _OURS.fullmatch(file.name):
            file.unlink()
    for part in PART_NAMES:
        if (out / part).is_dir() and not _entries(out / part):
            (out / part).rmdir()


def _write_part(
    data: ImageSet[int],
    folder: Path,
    part: str,
    max_bytes: int,
    shorter_side: int | None,
    seed: int,
    left_out: list[str],
) -> dict[str, Any]:
    """Write one part and its index; returns `index.json`."""
    import pyarrow as pa

    pq = parquet(str(folder))
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    shards: list[dict[str, Any]] = []
    rows: dict[str, list[Any]] = {name: [] for name in ("shard", "key", "label", "offset", "size", "extension")}
    keys = _FreeKeys()
    with Progress(f"write {part}", len(data)) as progress, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        stream = _Stream(_prepared(data, order, shorter_side, pool, progress, left_out))
        try:
            while stream.peek() is not None:
                number, first = len(shards), len(rows["key"])
                path = folder / f"{part}-{number:06d}.tar"
                write_atomically(path, lambda file: _fill(file, data, stream, keys, max_bytes, rows))
                rows["shard"] += [number] * (len(rows["key"]) - first)
                shards.append(
                    {
                        "name": path.name,
                        "images": len(rows["key"]) - first,
                        "bytes": path.stat().st_size,
                        "sha256": _sha256(path),
                    }
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not shards:
        raise ShardError(f"{data.origin}: no image can be read; {left_out[0] if left_out else 'there is none'}")
    types = (pa.int32(), pa.string(), pa.int32(), pa.int64(), pa.int64(), pa.string())
    table = pa.table({name: pa.array(rows[name], kind) for name, kind in zip(rows, types, strict=True)})
    write_atomically(folder / TABLE, lambda file: pq.write_table(table, file))
    index = {"format": FORMAT, "version": VERSION, "images": len(rows["key"]), "classes": list(data.classes)}
    index["shards"] = shards
    write_json(folder / INDEX, index)
    return index


class _Stream:
    """An iterator that can be looked into."""

    def __init__(self, items: Iterator[_Image]) -> None:
        self._items = items
        self._next = next(items, None)

    def peek(self) -> _Image | None:
        return self._next

    def take(self) -> _Image:
        taken = self._next
        assert taken is not None
        self._next = next(self._items, None)
        return taken


class _FreeKeys:
    """Gives each image a key of its own: its name, without what WebDataset would take for an extension."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, name: str) -> str:
        stem = re.sub(r"\.\w+$", "", name).encode(errors="replace").decode()
        key = base = re.sub(r"[.\\?*:\"<>|\x00-\x1f]", "_", stem).strip("/") or "image"
        number = 1
        while key in self._taken:
            number += 1
            key = f"{base}-{number}"
        self._taken.add(key)
        return key


def _fill(
    file: Path, data: ImageSet[int], stream: _Stream, keys: _FreeKeys, max_bytes: int, rows: dict[str, list[Any]]
) -> None:
    with tarfile.open(file, "w") as tar:
        while (image := stream.peek()) is not None:
            record = 3 * _BLOCK + _padded(len(image.data))  # two headers, the label
            if tar.offset and _padded(tar.offset + record + 2 * _BLOCK, tarfile.RECORDSIZE) > max_bytes:
                return
            stream.take()
            key, label = keys.free(data.names[image.number]), data.targets[image.number]
            _add(tar, f"{key}.{image.extension}", image.data)
            end: int = tar.offset
            _add(tar, f"{key}.cls", str(label).encode())
            row = (key, label, end - _padded(len(image.data)), len(image.data), image.extension)
            for name, value in zip(("key", "label", "offset", "size", "extension"), row, strict=True):
                rows[name].append(value)


def _padded(size: int, to: int = _BLOCK) -> int:
    return -(-size // to) * to


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Without time or owner, so that equal images make equal shards.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _prepared(
    data: ImageSet[int],
    order: list[int],
    shorter_side: int | None,
    pool: ThreadPoolExecutor,
    progress: Progress,
    left_out: list[str],
) -> Iterator[_Image]:
    """The images in order, read some ahead; without those that cannot be."""
    waiting: deque[Future[_Image]] = deque()
    numbers = iter(order)
    prepare = partial(_prepare, data, shorter_side)
    while True:
        while len(waiting) < _READ_AHEAD and (number := next(numbers, None)) is not None:
            waiting.append(pool.submit(prepare, number))
        if not waiting:
            return
        try:
            image = waiting.popleft().result()
        except ImageError as error:
            left_out.append(str(error))
            image = None
        progress.advance(1)
        if image is not None:
            yield image


def _prepare(data: ImageSet[int], shorter_side: int | None, number: int) -> _Image:
    """Raises: ImageError: it cannot be read."""
    source, name = data.open(number), data.names[number]
    if isinstance(source, str | os.PathLike):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror})") from None
    assert isinstance(source, bytes), "images to classify are files or bytes"
    image = read_image(source, name)  # decodes all of it, so that a damaged one is found now
    if shorter_side is None or min(image.size) <= shorter_side:
        with Image.open(io.BytesIO(source)) as opened:
            return _Image(number=number, data=source, extension=_EXTENSIONS[opened.format or "JPEG"])
    scale = shorter_side / min(image.size)
    size = (max(shorter_side, round(image.width * scale)), max(shorter_side, round(image.height * scale)))
    written = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(written, "JPEG", quality=_JPEG_QUALITY)
    return _Image(number=number, data=written.getvalue(), extension="jpg")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
