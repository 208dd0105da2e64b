"""Serve the files of the web page from memory."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from mobilevit.serving.refusal import RefusalError

# No other sites, nothing inline; images that the page has made or received are blobs and data.
_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:",
        "connect-src 'self'", "font-src 'self'", "media-src 'self' blob:", "manifest-src 'self'",
        "worker-src 'self' blob:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
# Not all systems know these types, and browsers run a module only if its type is JavaScript.
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html"}


class Pages:
    """The files by name, each with its type and ETag."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = {name: (data, _type(name), _etag(data)) for name, data in files.items()}

    def answer(self, request: Request, name: str) -> Response:
        """Send a file, or 304 if the browser has it.

        Raises:
            RefusalError: 404, there is no such file.
        """
        if name not in self._files:
            raise RefusalError(404, f"no such path: {request.url.path}")
        data, kind, etag = self._files[name]
        headers = {
            "ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer", "Content-Type": kind,
        }  # fmt: skip
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers)


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _type(name: str) -> str:
    suffix = "." + name.rpartition(".")[2]
    kind = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
