"""Files: writing them whole or not at all, reporting those that cannot be read or written, the cache folder, locks."""

from __future__ import annotations

import errno
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobilevit.errors import MobileViTError, one_line

Json = dict[str, Any]
"""A JSON object, with values as `json.dumps` takes them."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ReadError(MobileViTError):
    """A file that cannot be read."""


class WriteError(MobileViTError):
    """A file that cannot be written; the file that was there before is unchanged."""


@contextmanager
def reading_from(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` into a `ReadError` that names `path`; for code that only reads a file the user named."""
    try:
        yield
    except FileNotFoundError as error:
        raise ReadError(f"{path}: no such file") from error
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({one_line(error)})") from error


@contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` into a `WriteError` that names `path`; for code that only writes where the user said."""
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise _no_room(path) from error
        is_in_the_way = isinstance(error, FileExistsError)  # where a folder is to be made
        reason = f"{error.filename} is not a folder" if is_in_the_way else one_line(error)
        raise WriteError(f"{path}: cannot be written ({reason}); choose another place") from error


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it, so that no reader ever sees half a file.

    Raises:
        WriteError: there is no room or no permission; the old file, if any, is unchanged.
    """
    path = Path(path)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # File systems limit the length of names, so a long one is cut.
        aside = path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex}{path.suffix}")
        aside.touch(exist_ok=False)
    try:
        try:
            write(aside)
        except Exception as error:
            if disk_is_full(error):
                raise _no_room(path) from error
            raise
        with writing_to(path):
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def disk_is_full(error: Exception) -> bool:
    """Say whether an error means that the disk, or this user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def _no_room(path: str | os.PathLike[str]) -> WriteError:
    return WriteError(f"no room to write {path}; free some space (or choose another folder) and start again")


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write bytes, whole or not at all.

    Checkpoints are serialized in memory and written by this function: the writers of torch and safetensors lose the
    reason of a failure, such as a full disk.
    """
    return write_atomically(path, lambda aside: aside.write_bytes(data))


def as_utf8(text: str) -> str:
    """Escape the bytes of file names that are not UTF-8, so that they can be printed; JSON reads them back."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file, whole or not at all."""
    return write_bytes(path, as_utf8(text).encode())


def write_json(path: str | os.PathLike[str], value: object) -> Path:
    """Write a value as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def cache_folder() -> Path:
    """Return the user's folder for files that can be fetched again: $MOBILEVIT_HOME, or ~/.cache/mobilevit."""
    return Path(os.environ.get("MOBILEVIT_HOME") or "~/.cache/mobilevit").expanduser()


@contextmanager
def file_lock(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that all processes of this machine share; the system releases it when the process ends.

    The lock file is created if missing, and left in place. On Windows, which has no such locks, the block runs anyway.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is off.
        OSError: the lock file cannot be opened.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
