"""From an error to what the user reads and the exit status: one line and 2 for a mistake, else a traceback and 1."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path

import mobilevit


class UsageError(ValueError):
    """A command line that cannot be understood."""


_WRONG_PATH = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)


def report_error(error: Exception) -> int:
    """Say what went wrong; a user's mistake in one line, anything else with its traceback."""
    from mobilevit.files import DiskFullError, disk_is_full

    if type(error).__name__ == "TrainingInterrupted":
        print(error, file=sys.stderr)
        return 1
    if isinstance(error, DiskFullError):
        return _mistake(str(error.strerror))
    if disk_is_full(error):
        return _mistake(f"no room on the disk ({error}); free some space")
    if isinstance(error, OSError) and error.errno in _WRONG_PATH:
        return _mistake(f"{error.filename}: {error.strerror}")
    if type(error).__name__ == "OutOfMemoryError":
        return _mistake("the GPU has too little memory; lower --batch-size or --image-size")
    if type(error).__name__ == "ShardError":
        # A worker process's is told with its traceback in the text, the message at the end.
        return _mistake(str(error).rstrip().rpartition("\n")[2].rpartition("ShardError: ")[2])
    if isinstance(error, ValueError) and _raised_by_us(error):
        return _mistake(str(error))
    traceback.print_exception(error)
    return 1


def _raised_by_us(error: Exception) -> bool:
    """Whether this package noticed a mistake, rather than some library a bug of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(mobilevit.__file__).parent)


def _mistake(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
