"""Reading of shards: local files as they are, remote ones through a cache folder.

A remote shard is fetched whole, once on each machine; the least recently used ones make room.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mobilevit.errors import ImageError, MobileViTError
from mobilevit.files import WriteError, cache_folder, file_lock, write_atomically
from mobilevit.remote import file_system, is_url, read_bytes, with_retries

_MAX_OPEN = 32
"""Shards that one process keeps open: twice what a sampler mixes."""
_STALE_S = 24 * 3600.0
"""Age at which a half-written file in the cache belongs to no living process."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar file."""

    place: str
    """Path or URL."""
    num_bytes: int | None
    """The length it should have; None if unknown."""
    version: str
    """Tells it from another file that lay at the same place before."""


# -- places -----------------------------------------------------------------------------------------------------------

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")


def is_pattern(place: str | os.PathLike[str]) -> bool:
    """Whether this stands for several files: {000000..000009}, {a,b}, * or [ab]."""
    text = os.fspath(place)
    return bool(_BRACES.search(text)) or "*" in text or (not is_url(text) and glob.has_magic(text))


def name_of(place: str) -> str:
    """Return the last part of a path or URL."""
    return (urlsplit(place).path if is_url(place) else place).rstrip("/").rpartition("/")[2] or place


def folder_of(place: str) -> str:
    """Return the path or URL of the folder around a place."""
    return place.partition("?")[0].rstrip("/").rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def join(folder: str, name: str) -> str:
    """Return the path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def expand(pattern: str) -> list[str]:
    """List the paths or URLs that a pattern stands for, at least one: braces as in a shell, then * and [ab]."""
    if braces := _BRACES.search(pattern):
        first, dots, last = braces[1].partition("..")
        choices: Sequence[str] = braces[1].split(",")
        if dots:
            width = len(first) if first.startswith("0") else 0
            choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise MobileViTError(f"{pattern}: {braces[0]} counts down; write the smaller number first")
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        return [place for choice in choices for place in expand(before + choice + after)]
    if not is_pattern(pattern):
        return [pattern]
    found = list_matches(pattern)
    if not found:
        raise MobileViTError(f"{pattern}: matches no file; look at the folder and the number of digits")
    return found


def list_matches(pattern: str) -> list[str]:
    """List the paths or URLs that match a pattern with * or [ab]; perhaps none."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern))  # noqa: PTH207, absolute patterns too
    system, path = file_system(pattern)
    try:
        return sorted(map(system.unstrip_protocol, with_retries(pattern, lambda: system.glob(path))))
    except FileNotFoundError:
        return []


def read_small(place: str) -> bytes | None:
    """Read a small file; None if it is not there."""
    try:
        return read_bytes(place) if is_url(place) else Path(place).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def describe(place: str) -> ShardFile:
    """Ask for the length and version of a shard, which must be there."""
    try:
        if not is_url(place):
            stat = Path(place).stat()
            return ShardFile(place=place, num_bytes=stat.st_size, version=f"{stat.st_size} {stat.st_mtime_ns}")
        system, path = file_system(place)
        info: dict[str, object] = with_retries(place, lambda: system.info(path))
    except (FileNotFoundError, NotADirectoryError):
        raise MobileViTError(f"{place}: no such shard; look at the folder and the number of digits") from None
    size = info.get("size")
    changes = [str(info[key]) for key in ("ETag", "LastModified", "mtime", "updated", "created") if info.get(key)]
    return ShardFile(
        place=place, num_bytes=size if isinstance(size, int) else None, version=" ".join([str(size), *changes])
    )


# -- the cache --------------------------------------------------------------------------------------------------------


def _shard_cache() -> Path:
    chosen = os.environ.get("MOBILEVIT_SHARD_CACHE")
    return Path(chosen).expanduser() if chosen else cache_folder() / "shards"


def _max_bytes() -> float:
    chosen = os.environ.get("MOBILEVIT_SHARD_CACHE_GB") or "20"
    with suppress(ValueError):
        if float(chosen) > 0:
            return float(chosen) * 1e9
    raise MobileViTError(f"MOBILEVIT_SHARD_CACHE_GB is {chosen!r}; it must be a number above 0")


def digest(text: str) -> str:
    """Hash a text to a short name."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(OSError):  # nowhere to write: work may be done twice, and is still right
            _shard_cache().mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(_shard_cache() / f".{digest(name)}.lock"))
        yield


def open_shard(shard: ShardFile) -> FileIO:
    """Open a shard; a remote one is fetched first, by one process of this machine while others wait."""
    if not is_url(shard.place):
        return FileIO(shard.place)
    name = name_of(shard.place)
    path = _shard_cache() / f"{digest(f'{shard.place} {shard.version}')}-{name}"
    with _locked(path.name):
        for _ in range(3):  # another process may make room between fetching and opening
            try:
                file = FileIO(path)
            except FileNotFoundError:
                _fetch(shard, path)
                continue
            with suppress(OSError):
                os.utime(path)  # its time says when it was last used
            return file
    raise MobileViTError(f"{_shard_cache()}: has no room for {name}; raise MOBILEVIT_SHARD_CACHE_GB")


def _fetch(shard: ShardFile, path: Path) -> None:
    system, there = file_system(shard.place)

    def download(aside: Path) -> None:
        for _ in range(2):  # a file cut short by a proxy may come whole the next time
            with_retries(shard.place, lambda: system.get_file(there, str(aside)))
            if shard.num_bytes in (None, aside.stat().st_size):
                break

    try:
        write_atomically(path, download)
    except FileNotFoundError:
        raise MobileViTError(f"{shard.place}: no such shard, though the index names it; upload it") from None
    except WriteError as error:
        raise WriteError(f"{error}; MOBILEVIT_SHARD_CACHE names the folder") from None
    _make_room(path)


def _make_room(kept: Path) -> None:
    """Remove the least recently used shards until the others are within the limit.

    Processes that have one of them open read on: the system keeps a file until its last reader closes it.
    """
    limit = _max_bytes()
    with _locked("make room"):
        now, found = time.time(), []
        for path in kept.parent.iterdir():
            with suppress(OSError):  # another process has removed it
                stat = path.stat()
                if not path.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix != ".lock" and now - stat.st_mtime > _STALE_S:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > limit and path != kept:
                with suppress(OSError):
                    path.unlink()
                total -= size


# -- images -----------------------------------------------------------------------------------------------------------

_ONE_AT_A_TIME = threading.Lock()


opened = lru_cache(maxsize=_MAX_OPEN)(open_shard)
"""Return an open shard, perhaps one that was opened before; it closes when nobody uses it any more."""


def read_range(file: FileIO, offset: int, size: int) -> bytes:
    """Read part of a file; threads, and forked processes that share its position, do not disturb each other."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with _ONE_AT_A_TIME:  # Windows, which does not fork
        file.seek(offset)
        return file.read(size) or b""


@dataclass(frozen=True, eq=False)
class ShardImages:
    """The encoded images of shards by number: `ImageSet.open` for shards."""

    shards: Sequence[ShardFile]
    shard_of: NDArray[np.int32]
    """(N,): number of the shard that an image is in."""
    offsets: NDArray[np.int64]
    """(N,): where in it the image begins, in bytes."""
    sizes: NDArray[np.int64]
    """(N,): its length in bytes."""

    def __call__(self, number: int) -> bytes:
        """Read the bytes of an image; `ImageError` if its shard cannot be read or ends before."""
        shard = self.shards[self.shard_of[number]]
        offset, size = int(self.offsets[number]), int(self.sizes[number])
        try:
            data = read_range(opened(shard), offset, size)
        except OSError as error:
            raise ImageError(f"{shard.place}: cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise ImageError(f"{shard.place}: ends before its image at byte {offset}; copy the shard again")
        return data
