"""Where shards lie, and how to read them: local files as they are, others through a cache folder.

Everything but local paths goes through fsspec. A remote shard is fetched whole, once on each machine, and the least
recently used ones make room.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from mobilevit.errors import ImageError, MobileViTError
from mobilevit.files import DiskFullError, cache_folder, disk_is_full, file_lock, write_atomically

Value = TypeVar("Value")

NUM_RETRIES = 5
"""After a first try that failed."""
FIRST_WAIT_S = 0.5
"""Before the first retry; each wait is twice the one before."""
MAX_OPEN = 32
"""Shards that one process keeps open: twice what a sampler mixes."""
_STALE_S = 24 * 3600.0
"""Age at which a half-written file in the cache belongs to nobody alive."""


class ShardError(MobileViTError):
    """Shards that cannot be used, in one line."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One tar file."""

    place: str
    """Path or URL."""
    num_bytes: int | None
    """How long it is meant to be; None: not known."""
    version: str = ""
    """Tells it from another file that lay at the same URL before."""

    @property
    def name(self) -> str:
        """Its file name, for messages."""
        return name_of(self.place)


# -- places -----------------------------------------------------------------------------------------------------------


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether this is the address of something elsewhere, such as https:// or s3://."""
    return isinstance(place, str) and re.match(r"[A-Za-z][\w+.-]*://", place) is not None


def is_pattern(place: str | os.PathLike[str]) -> bool:
    """Whether this stands for several files: {000000..000009}, {a,b}, * or [ab]."""
    text = os.fspath(place)
    return bool(_BRACES.search(text)) or "*" in text or (not is_url(text) and glob.has_magic(text))


def name_of(place: str) -> str:
    """The last part of a path or URL."""
    return (urlsplit(place).path if is_url(place) else place).rstrip("/").rpartition("/")[2] or place


def folder_of(place: str) -> str:
    """Path or URL of the folder around it."""
    return place.partition("?")[0].rstrip("/").rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def join(folder: str, name: str) -> str:
    """Path or URL of what is called `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")


def expand(pattern: str) -> list[str]:
    """The paths or URLs that a pattern stands for; braces as in a shell, then * and [ab] where they are.

    Raises:
        ShardError: it matches nothing.
    """
    if braces := _BRACES.search(pattern):
        inside = braces[1]
        choices: Sequence[str] = inside.split(",")
        if ".." in inside:
            first, last = inside.split("..")
            width = len(first) if first.startswith("0") else 0
            choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise ShardError(f"{pattern}: {braces[0]} counts down; write the smaller number first")
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        return [place for choice in choices for place in expand(before + choice + after)]
    if not is_pattern(pattern):
        return [pattern]
    found = _remote_glob(pattern) if is_url(pattern) else sorted(glob.glob(pattern))  # noqa: PTH207, absolute too
    if not found:
        raise ShardError(f"{pattern}: matches no file; look at the folder and the number of digits")
    return found


# -- elsewhere --------------------------------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    """What fsspec opens the URL with, and the path in it.

    Raises:
        ShardError: a package is missing, or nothing knows such URLs.
    """
    try:
        import fsspec
    except ImportError:
        raise ShardError(f"{url}: reading from elsewhere needs fsspec; pip install 'mobilevit[train]'") from None
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # The default is five minutes for all of a file, which is little for a shard and much for a dead server.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        missing = re.search(r"[Ii]nstall (\w+)", str(error))
        package = "aiohttp" if options or protocol.startswith("http") else missing[1] if missing else error.name
        raise ShardError(f"{url}: reading {protocol}:// needs another package; pip install {package}") from None
    except ValueError as error:
        raise ShardError(f"{url}: cannot be read from ({error}); fsspec lists what can be") from None
    return system, path


def _patiently(url: str, act: Callable[[], Value]) -> Value:
    """Do it, again and again if the endpoint fails.

    Raises:
        FileNotFoundError: there is no such file, which no patience helps.
        ShardError: it failed each time, or access is denied.
    """
    for attempt in range(NUM_RETRIES + 1):
        try:
            return act()
        except (FileNotFoundError, DiskFullError, ShardError):
            raise
        except Exception as error:  # each file system has its own
            told = " ".join(str(error).split()) or type(error).__name__
            status = getattr(error, "status", None)
            if disk_is_full(error):
                raise
            refused = isinstance(error, PermissionError) or (isinstance(status, int) and 400 <= status < 500)
            if refused and status not in (408, 429):
                raise ShardError(f"{url}: access is denied ({told}); look at address and credentials") from None
            if attempt == NUM_RETRIES:
                tries = f"{NUM_RETRIES + 1} tries"
                raise ShardError(f"{url}: cannot be fetched after {tries} ({told}); is the server up?") from None
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError


def _remote_glob(pattern: str) -> list[str]:
    def act() -> list[str]:
        system, path = _file_system(pattern)
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))

    with contextlib.suppress(FileNotFoundError):
        return _patiently(pattern, act)
    return []


def read_small(place: str) -> bytes | None:
    """All of a small file, or None if it is not there.

    Raises:
        ShardError: the endpoint fails.
    """

    def act() -> bytes:
        system, path = _file_system(place)
        data: bytes = system.cat_file(path)
        return data

    try:
        return _patiently(place, act) if is_url(place) else Path(place).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def describe(place: str) -> ShardFile:
    """Length and version of a shard of which nothing is known yet.

    Raises:
        ShardError: it is not there, or the endpoint fails.
    """

    def act() -> dict[str, Any]:
        system, path = _file_system(place)
        info: dict[str, Any] = system.info(path)
        return info

    try:
        if not is_url(place):
            stat = Path(place).stat()
            return ShardFile(place=place, num_bytes=stat.st_size, version=f"{stat.st_size} {stat.st_mtime_ns}")
        info = _patiently(place, act)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{place}: no such shard; look at the folder and the number of digits") from None
    changes = [str(info[key]) for key in ("ETag", "LastModified", "mtime", "updated", "created") if info.get(key)]
    return ShardFile(place=place, num_bytes=info.get("size"), version=" ".join([str(info.get("size")), *changes]))


# -- the cache --------------------------------------------------------------------------------------------------------


def shard_cache() -> Path:
    """The folder that remote shards are fetched into: $MOBILEVIT_SHARD_CACHE, or one in the user's cache."""
    told = os.environ.get("MOBILEVIT_SHARD_CACHE")
    return Path(told).expanduser() if told else cache_folder() / "shards"


def cache_bound() -> int:
    """Bytes that the cache may take.

    Raises:
        ShardError: $MOBILEVIT_SHARD_CACHE_GB is no number above 0.
    """
    told = os.environ.get("MOBILEVIT_SHARD_CACHE_GB") or "20"
    with contextlib.suppress(ValueError):
        if float(told) > 0:
            return int(float(told) * 1e9)
    raise ShardError(f"MOBILEVIT_SHARD_CACHE_GB is {told!r}; it must be a number above 0")


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock that all processes of this machine share; released with the process, however it ends."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # nowhere to write: work may be done twice, and is still right
            shard_cache().mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(shard_cache() / f".{_digest(name)}.lock"))
        yield


def open_shard(shard: ShardFile) -> FileIO:
    """Open it for reading; a remote one is fetched first, by one process of this machine while others wait.

    Raises:
        ShardError: it cannot be fetched, or there is nowhere to keep it.
        OSError: a local one cannot be opened.
    """
    if not is_url(shard.place):
        return FileIO(shard.place)
    path = shard_cache() / f"{_digest(f'{shard.place} {shard.version}')}-{shard.name}"
    with locked(path.name):
        for _ in range(3):  # another process may make room between fetching and opening
            try:
                file = FileIO(path)
            except FileNotFoundError:
                _fetch(shard, path)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)  # its time says when it was last used
            return file
    raise ShardError(f"{shard_cache()}: has no room for {shard.name}; raise MOBILEVIT_SHARD_CACHE_GB")


def _fetch(shard: ShardFile, path: Path) -> None:
    def act(aside: Path) -> None:
        system, there = _file_system(shard.place)
        system.get_file(there, str(aside))

    def download(aside: Path) -> None:
        for _ in range(2):  # a file cut short by a proxy may come whole the next time
            _patiently(shard.place, lambda: act(aside))
            if shard.num_bytes in (None, aside.stat().st_size):
                break

    try:
        write_atomically(path, download)
    except FileNotFoundError:
        raise ShardError(f"{shard.place}: no such shard, though the index names it; upload it") from None
    except DiskFullError:
        raise ShardError(
            f"{path.parent}: no room for {shard.name}; free some, or set MOBILEVIT_SHARD_CACHE to another disk"
        ) from None
    except OSError as error:
        raise ShardError(
            f"{path.parent}: cannot be written ({error.strerror}); set MOBILEVIT_SHARD_CACHE to another folder"
        ) from None
    _make_room(path)


def _make_room(kept: Path) -> None:
    """Remove the shards that were not used for longest, until the rest is within the bound.

    Processes that have one of them open read on: the system keeps a file until its last reader closes it.
    """
    bound = cache_bound()
    with locked("make room"):
        now, found = time.time(), []
        for path in kept.parent.iterdir():
            with contextlib.suppress(OSError):  # removed by somebody else
                stat = path.stat()
                if not path.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix != ".lock" and now - stat.st_mtime > _STALE_S:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= bound:
                break
            if path != kept:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


# -- images ---------------------------------------------------------------------------------------------------------


class ShardImages:
    """Encoded images by number; what `ImageSet.open` is for shards.

    Can be sent to other processes, and lives on in forked ones: each opens the shards for itself.

    Args:
        shards: the files.
        shard_of: (N,) which of them an image is in.
        offsets: (N,) where in it the image begins, in bytes.
        sizes: (N,) its length in bytes.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        shard_of: NDArray[np.int32],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        self.shards, self.shard_of, self.offsets, self.sizes = tuple(shards), shard_of, offsets, sizes
        self._of_process: dict[int, _OpenShards] = {}

    def __call__(self, number: int) -> bytes:
        """The bytes of an image.

        Raises:
            ImageError: its shard is missing, cannot be read or ends before.
            ShardError: its shard cannot be fetched.
        """
        # File positions are shared with a forked process, so what the parent opened is not for its children.
        process = os.getpid()
        if process not in self._of_process:
            self._of_process = {process: _OpenShards()}
        shard = self.shards[self.shard_of[number]]
        offset, size = int(self.offsets[number]), int(self.sizes[number])
        try:
            data = self._of_process[process].read(shard, offset, size)
        except OSError as error:
            raise ImageError(f"{shard.place}: cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise ImageError(f"{shard.place}: ends before its image at byte {offset}; copy the shard again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_process": {}}


class _OpenShards:
    """The files that a process has open, the last used ones; its threads take turns."""

    def __init__(self) -> None:
        self._files: OrderedDict[ShardFile, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: ShardFile, offset: int, size: int) -> bytes:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = open_shard(shard)
                if len(self._files) > MAX_OPEN:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(shard)
            file = self._files[shard]
            file.seek(offset)
            return file.read(size) or b""
