"""Find the images that a user names: files, folders, globs, and URLs that fsspec can read."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mobilevit.errors import ImageError, MobileViTError, one_line
from mobilevit.files import reading_from
from mobilevit.imaging.decode import IMAGE_SUFFIXES, find_images
from mobilevit.remote import file_system, is_url, read_bytes, with_retries


def find_sources(arguments: Iterable[str]) -> list[str]:
    """Find the images of each argument, in order, each once.

    Raises:
        MobileViTError: a folder without images, a glob that matches nothing, or a place that cannot be listed.
    """
    found = [source for place in arguments for source in (_find_remote(place) if is_url(place) else find_local(place))]
    return list(dict.fromkeys(found))


def find_local(argument: str) -> list[str]:
    """Find the images of a folder or a glob; anything else is a file, even if it does not exist.

    Raises:
        MobileViTError: there are none, or the folder cannot be listed.
    """
    path = Path(argument)
    with reading_from(path):
        if path.is_dir():
            inside = [str(p) for p in find_images(path)]
            if not inside:
                raise MobileViTError(f"{argument}: no images in this folder")
            return inside
        if not path.exists() and glob.has_magic(argument):
            matches = sorted(m for m in glob.glob(argument, recursive=True) if Path(m).is_file())  # noqa: PTH207, absolute patterns too
            if not matches:
                raise MobileViTError(f"{argument}: matches no file")
            return matches
    return [argument]


def _find_remote(url: str) -> list[str]:
    try:
        return with_retries(url, lambda: _list(url))
    except OSError as error:
        raise MobileViTError(f"{url}: cannot be listed ({one_line(error)})") from None


def _list(url: str) -> list[str]:
    """List the images below a prefix or of a glob; anything else is a file, even if it does not exist."""
    system, path = file_system(url)
    if glob.has_magic(path):
        matches = sorted(system.unstrip_protocol(match) for match in system.glob(path) if system.isfile(match))
        if not matches:
            raise MobileViTError(f"{url}: matches no file")
        return matches
    if url.startswith(("http://", "https://")) or not system.isdir(path):  # web servers do not list files
        return [url]
    inside = []
    for name in sorted(system.find(path)):
        below = PurePosixPath(name.removeprefix(path))
        is_hidden = any(part.startswith(".") for part in below.parts)
        if below.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
            inside.append(system.unstrip_protocol(name))
    if not inside:
        raise MobileViTError(f"{url}: no images below this place")
    return inside


def read_source(source: str) -> str | bytes:
    """Return a source for `read_image`: a local path as it is, the bytes of a URL.

    Raises:
        ImageError: it cannot be read.
    """
    if not is_url(source):
        return source
    try:
        return read_bytes(source)
    except FileNotFoundError:
        raise ImageError(f"{source}: no such file") from None
    except OSError as error:
        raise ImageError(f"{source}: cannot be read ({one_line(error)})") from error
    except MobileViTError as error:
        raise ImageError(str(error)) from error
