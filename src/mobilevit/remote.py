"""Files on web servers and in object stores, by URL, through fsspec."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mobilevit.errors import MissingPackageError, MobileViTError, one_line
from mobilevit.files import disk_is_full

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Value = TypeVar("Value")

_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each further attempt."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, such as s3://bucket/folder, and not a local path."""
    return isinstance(place, str) and re.match(r"[A-Za-z][\w+.-]*://", place) is not None


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec file system that reads a URL, and the path in it.

    Raises:
        MobileViTError: a package is missing, or fsspec knows no such URLs.
    """
    try:
        import fsspec
    except ImportError:
        raise MissingPackageError(
            f"{url}: reading from elsewhere needs fsspec; pip install 'mobilevit[bulk]'"
        ) from None
    protocol = url.partition("://")[0]
    options: dict[str, object] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            # The default is five minutes for a whole file: too short for a shard, too long for a dead server.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        named = re.search(r"[Ii]nstall (\w+)", str(error))
        package = named[1] if named and protocol not in ("http", "https") else error.name
        raise MissingPackageError(
            f"{url}: reading {protocol}:// needs another package; pip install {package}"
        ) from None
    except ValueError as error:
        raise MobileViTError(f"{url}: cannot be read from ({one_line(error)}); fsspec lists what can be") from None
    return system, path


def with_retries(url: str, act: Callable[[], Value]) -> Value:
    """Call `act`, and call it again after a while if the server fails.

    Raises:
        OSError: there is no such file, it is a folder, or the local disk is full.
        MobileViTError: every attempt failed, or access is denied.
    """
    for wait in (*_WAITS_S, None):
        try:
            return act()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, MobileViTError):
            raise
        except Exception as error:  # each file system of fsspec raises its client's errors
            if disk_is_full(error):
                raise
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
            if refused or isinstance(error, PermissionError):
                remedy = "look at address and credentials"
                raise MobileViTError(f"{url}: access is denied ({one_line(error)}); {remedy}") from error
            if wait is None:
                tries = f"{len(_WAITS_S) + 1} tries"
                raise MobileViTError(
                    f"{url}: cannot be fetched after {tries} ({one_line(error)}); is the server up?"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def read_bytes(url: str) -> bytes:
    """Read a whole file; errors are those of `with_retries`."""
    system, path = file_system(url)
    data: bytes = with_retries(url, lambda: system.cat_file(path))
    return data
