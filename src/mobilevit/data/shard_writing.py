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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mobilevit.card import TaskName
from mobilevit.data.datasets import find_splits
from mobilevit.data.folders import PART_NAMES
from mobilevit.data.imageset import ImageSet, in_threads, split
from mobilevit.data.shards import FORMAT, INDEX, TABLE, VERSION
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.files import write_atomically, write_json, writing_to
from mobilevit.imaging.decode import read_image
from mobilevit.progress import Progress
from mobilevit.runtime.engine import import_runtime
from mobilevit.tasks.classification import CLASSIFICATION

_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp",
    "GIF": "gif", "TIFF": "tif", "PPM": "ppm", "AVIF": "avif",
}  # fmt: skip
_JPEG_QUALITY = 95
_OURS = re.compile(rf"({'|'.join(PART_NAMES)})-\d{{6,}}\.tar|{re.escape(INDEX)}|{re.escape(TABLE)}")


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Summary of `write_shards`."""

    out: str
    shards: int
    images: int
    num_bytes: int
    left_out: tuple[str, ...]
    """One line for each image that cannot be read."""

    def lines(self) -> list[str]:
        """Return the report to print."""
        lines = [f"{self.out}: {self.images:,} images in {self.shards} shards, {self.num_bytes / 1e6:,.1f} MB"]
        if self.left_out:
            lines += [f"left out {len(self.left_out)} images, which cannot be read:"]
            lines += [f"  {line}" for line in self.left_out[:10]]
            lines += [f"  and {len(self.left_out) - 10} more"] if len(self.left_out) > 10 else []
        return lines


def write_shards(
    data: str | os.PathLike[str],
    out: Path,
    *,
    task: TaskName | None = None,
    max_bytes: int = 256_000_000,
    shorter_side: int | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ShardReport:
    """Write the images at `data` as shards, shuffled once, so that each shard is a mix of the classes.

    Divided data become a sub-folder a part. Nothing appears in `out` before all of it is written, except a hidden
    folder that goes with an error or Ctrl-C.

    Args:
        data: labeled images, as for training.
        out: folder; empty, or none yet.
        task: as for `find_splits`.
        max_bytes: size of a shard; one with a single larger image passes it.
        shorter_side: larger images are made this small, in pixels, and JPEG; None copies their bytes.
        val_fraction: share of each class for a val part, if the data are not divided; None leaves them so.
        seed: decides order and parts.
        overwrite: replace shards written before.
    """
    if max_bytes < 1:
        raise MobileViTError(f"`max_mb` is {max_bytes / 1e6:g}; it must be above 0")
    if shorter_side is not None and shorter_side < 32:
        raise MobileViTError(f"`shorter_side` is {shorter_side}; it must be 32 or more")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise MobileViTError(f"`val_fraction` is {val_fraction}; it must be between 0 and 1")
    import_runtime("pyarrow", "train")  # fails before the work if it is missing
    former = _former(out)
    if former and not overwrite:
        raise MobileViTError(f"{out}: already holds shards; choose another `out`, or replace them with `overwrite`")
    splits = find_splits(data, task)
    labeled_for = next(iter(splits.values())).task
    if labeled_for is not CLASSIFICATION:
        raise MobileViTError(f"{data}: is labeled for {labeled_for.name}; shards are for classification")
    if val_fraction is not None and "all" in splits:
        splits["all"].check_classes()
        train, val = split(splits["all"], val_fraction=val_fraction, seed=seed)
        splits = {"train": train, "val": val}
    left_out: list[str] = []
    shards: list[_Shard] = []
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=out, prefix=".writing-"))
        try:
            for part, images in splits.items():
                folder, name = (aside, "train") if part == "all" else (aside / part, part)
                folder.mkdir(exist_ok=True)
                writer = _Writer(folder, name, max_bytes)
                left_out += _add_all(writer, images, shorter_side, seed)
                shards += writer.write_index(images.classes)
            _remove(former, out)
            _move(aside, out, [part for part in splits if part != "all"])
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return ShardReport(
        out=str(out),
        shards=len(shards),
        images=sum(shard.images for shard in shards),
        num_bytes=sum(shard.bytes for shard in shards),
        left_out=tuple(left_out),
    )


def _former(out: Path) -> list[Path]:
    """List what earlier calls wrote; refuse a folder with anything else in it."""
    found = []
    for folder in (out, *(out / part for part in PART_NAMES)):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if _OURS.fullmatch(entry.name):
                found.append(entry)
            elif not entry.name.startswith(".") and not (folder == out and entry.name in PART_NAMES):
                name = entry.relative_to(out)
                raise MobileViTError(f"{out}: holds {name}, which is no shard of ours; choose an empty folder")
    return found


def _remove(former: Sequence[Path], out: Path) -> None:
    for file in sorted(former, key=lambda file: file.name != INDEX):  # without an index, no rest is taken for whole
        file.unlink()
    for part in PART_NAMES:
        with suppress(OSError):  # not there, or not empty
            (out / part).rmdir()


def _move(aside: Path, out: Path, parts: Sequence[str]) -> None:
    for part in parts or [""]:
        (out / part).mkdir(exist_ok=True)
        # The index last: it makes the folder what it is.
        for file in sorted((aside / part).iterdir(), key=lambda file: file.name == INDEX):
            file.replace(out / part / file.name)


# -- tar files --------------------------------------------------------------------------------------------------------


def _add_all(writer: _Writer, data: ImageSet[int], shorter_side: int | None, seed: int) -> list[str]:
    """Write the images of one part, shuffled; returns a line for each that cannot be read."""
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    left_out = []
    with Progress(f"write {writer.part}", len(data)) as progress:
        prepared = in_threads(partial(_prepare, data, shorter_side), order)
        for number, image in zip(order, prepared, strict=True):
            progress.advance(1)
            if isinstance(image, ImageError):
                left_out.append(str(image))
            else:
                writer.add(data.names[number], data.targets[number], *image)
    if not writer.rows:
        raise MobileViTError(f"{data.origin}: no image can be read; {left_out[0] if left_out else 'there is none'}")
    return left_out


class _Shard(NamedTuple):
    """A shard as `index.json` lists it."""

    name: str
    images: int
    bytes: int
    sha256: str


class _Writer:
    """The shards of one part."""

    def __init__(self, folder: Path, part: str, max_bytes: int) -> None:
        self.folder, self.part, self.max_bytes = folder, part, max_bytes
        self.rows: list[tuple[int, str, int, int, int, str]] = []
        self._shards: list[_Shard] = []
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, label: int, data: bytes, extension: str) -> None:
        """Add an image, to the next shard if it does not fit into this one."""
        record = 3 * tarfile.BLOCKSIZE + _padded(len(data))  # two headers, the label
        end = 2 * tarfile.BLOCKSIZE
        if self._tar and _padded(self._tar.offset + record + end, tarfile.RECORDSIZE) > self.max_bytes:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._path(), "w")  # noqa: SIM115, open while images are added
        key = self._free_key(name)
        _add(self._tar, f"{key}.{extension}", data)
        offset = self._tar.offset - _padded(len(data))
        _add(self._tar, f"{key}.cls", str(label).encode())
        self.rows.append((len(self._shards), key, label, offset, len(data), extension))

    def write_index(self, classes: Sequence[str]) -> list[_Shard]:
        """Finish the last shard and write the index."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._finish()
        schema = pa.schema(
            {
                "shard": pa.int32(), "key": pa.string(), "label": pa.int32(), "offset": pa.int64(), "size": pa.int64(),
                "extension": pa.string(),
            }
        )  # fmt: skip
        table = pa.table(dict(zip(schema.names, zip(*self.rows, strict=True), strict=True)), schema=schema)
        write_atomically(self.folder / TABLE, lambda file: pq.write_table(table, file))
        index = {"format": FORMAT, "version": VERSION, "images": len(self.rows), "classes": list(classes)}
        write_json(self.folder / INDEX, index | {"shards": [shard._asdict() for shard in self._shards]})
        return self._shards

    def _path(self) -> Path:
        return self.folder / f"{self.part}-{len(self._shards):06d}.tar"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path = self._path()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        images = len(self.rows) - sum(shard.images for shard in self._shards)
        self._shards.append(_Shard(path.name, images, path.stat().st_size, digest))

    def _free_key(self, name: str) -> str:
        """Make a key of its own for an image: its name, without what WebDataset would take for an extension."""
        stem = re.sub(r"\.\w+$", "", name).encode(errors="replace").decode()
        key = base = re.sub(r"[.\\?*:\"<>|\x00-\x1f]", "_", stem).strip("/") or "image"
        number = 1
        while key in self._keys:
            number += 1
            key = f"{base}-{number}"
        self._keys.add(key)
        return key


def _padded(size: int, to: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // to) * to


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Without time or owner, so that equal images make equal shards.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _prepare(data: ImageSet[int], shorter_side: int | None, number: int) -> tuple[bytes, str] | ImageError:
    """Return the bytes of an image and their extension, or why it cannot be read."""
    name = data.names[number]
    try:
        source = data.open(number)
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        assert isinstance(source, bytes), "images to classify are files or bytes"
        image = read_image(source, name)  # decodes all of it, so that a damaged one is found now
    except OSError as error:
        return ImageError(f"{name}: cannot be read ({error.strerror})")
    except ImageError as error:
        return error
    if shorter_side is None or min(image.size) <= shorter_side:
        with Image.open(io.BytesIO(source)) as opened:
            return source, _EXTENSIONS[opened.format or "JPEG"]
    scale = shorter_side / min(image.size)
    size = (max(shorter_side, round(image.width * scale)), max(shorter_side, round(image.height * scale)))
    written = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(written, "JPEG", quality=_JPEG_QUALITY)
    return written.getvalue(), "jpg"
