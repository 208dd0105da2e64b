"""Files that are either whole or not there: written aside, flushed to the disk, then renamed into place.

Also the folder for what can be fetched again, and locks between the processes of a machine.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobilevit.errors import MobileViTError

_ONE_AT_A_TIME = threading.Lock()
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class WriteError(MobileViTError):
    """A file that cannot be written; what stood there before is untouched."""


class DiskFullError(WriteError):
    """No room to write a file."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there, so that no reader ever sees half of it.

    Raises:
        WriteError: there is no room, or no right to write there; the old file, if any, is as it was.
    """
    path = Path(path)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
        try:
            write(aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.chmod(0o666 & ~_umask())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk or of missing rights into a `WriteError`."""
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            raise DiskFullError(
                f"no room to write {path}; free some space (or choose another folder) and start again"
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
            raise WriteError(f"{error.filename or path}: {error.strerror}; choose another place to write to") from error
        raise


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that the disk, or what this user may take of it, has no room left."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write bytes, whole or not at all.

    Checkpoints are made in memory and written by this: the writers of torch and safetensors lose the reason, such as
    a full disk, when they fail.
    """
    return write_atomically(path, lambda aside: aside.write_bytes(data))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file, whole or not at all."""
    # File names that are not UTF-8 hold lone surrogates; escaped by a backslash, JSON reads them back.
    return write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a value as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def cache_folder() -> Path:
    """The user's folder for what can be fetched again: $MOBILEVIT_HOME, or ~/.cache/mobilevit."""
    return Path(os.environ.get("MOBILEVIT_HOME") or "~/.cache/mobilevit").expanduser()


@contextmanager
def file_lock(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that all processes of this machine share; it is released with the process, however that ends.

    Windows has no such locks; there the block runs without one.

    Args:
        path: the lock file; it is created if missing, and left in place.
        wait: block until the lock is free.

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


def _umask() -> int:
    # The only portable way to read the umask is to set it, which is the whole process's.
    with _ONE_AT_A_TIME:
        mask = os.umask(0)
        os.umask(mask)
    return mask
