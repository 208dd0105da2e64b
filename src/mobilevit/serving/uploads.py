"""Read the images of a request into memory, within limits; uploads that are too large are refused early."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mobilevit.serving.refusal import busy

_RAW = "application/octet-stream"
_MAX_NAME = 200
_PARAMETERS = frozenset({"model", "top", "min_score", "x", "y"})


class Upload(NamedTuple):
    """An image as it was received."""

    name: str
    data: bytes


class UploadBudget:
    """The bytes of request bodies that a process may hold at a time.

    They are counted as they arrive, not as announced: a slow client holds only the part it has sent.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of one request, or refuses them; they are given back at the end."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if self._held + count > self._limit:
                raise busy(1)
            self._held += count
            held += count

        try:
            yield take
        finally:
            self._held -= held


async def read_uploads(
    request: Request, take: Callable[[int], None], *, max_bytes: int, max_files: int
) -> list[Upload]:
    """Read the images of a request: its body, or the files of its form.

    Raises:
        HTTPException: 400, 413, 415 or 422.
        ClientDisconnect: the client has disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind.startswith("image/") or kind in (_RAW, "multipart/form-data")):
        wanted = f"send an image as image/jpeg (or another image type, or {_RAW}), or files as multipart/form-data"
        raise HTTPException(415, f"content type {kind[:100] or 'missing'}; {wanted}")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        if "expect" not in request.headers:  # such a client waits before it sends the body
            await _discard(request.stream(), max_bytes)
        raise _too_large(max_bytes)
    body = _limited(request, take, max_bytes)
    if kind != "multipart/form-data":
        data = b"".join([chunk async for chunk in body])
        if not data:
            raise HTTPException(400, "the body is empty; send an image")
        return [Upload("image 1", data)]
    return await _read_form(request, body, max_files)


async def _limited(request: Request, take: Callable[[int], None], max_bytes: int) -> AsyncGenerator[bytes]:
    total, stream = 0, request.stream()
    async for chunk in stream:
        total += len(chunk)
        if total > max_bytes:
            await _discard(stream, max_bytes)
            raise _too_large(max_bytes)
        take(len(chunk))
        yield chunk


async def _discard(stream: AsyncIterator[bytes], max_bytes: int) -> None:
    """Read on for a while: a client that is still sending when the connection ends does not get the answer."""
    left = 4 * max_bytes
    async for chunk in stream:
        left -= len(chunk)
        if left < 0:
            return


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than the limit of {max_bytes / 1e6:g} MB")


class _FormParser(MultiPartParser):
    spool_max_size = 2**40  # never write to a disk; the body is limited


async def _read_form(request: Request, body: AsyncGenerator[bytes], max_files: int) -> list[Upload]:
    try:
        form = await _FormParser(request.headers, body, max_files=max_files, max_fields=16).parse()
    except (MultiPartException, ValueError, LookupError) as error:  # the latter two: odd headers
        if str(error).startswith("Too many files"):
            raise HTTPException(413, f"more than {max_files} images in a request") from None
        raise HTTPException(400, f"malformed form: {error}") from None
    try:
        for name, value in form.multi_items():
            if name in _PARAMETERS and isinstance(value, str):  # ignoring it could give the answer of another model
                raise HTTPException(422, f"{name} is in the form; write it into the address, as in ?{name}=...")
        files = [file for _, file in form.multi_items() if isinstance(file, UploadFile)]
        if not files:
            raise HTTPException(400, "no image in the form; send files under the name files")
        return [
            Upload((file.filename or "")[:_MAX_NAME] or f"image {number}", file.file.read())
            for number, file in enumerate(files, start=1)
        ]
    finally:
        await form.close()
