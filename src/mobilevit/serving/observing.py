"""Add to every request: an id, a line in the log, metrics, headers, and an answer if it fails."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobilevit.serving.logs import ACCESS
from mobilevit.serving.metrics import Metrics

log = logging.getLogger(ACCESS)

_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_GONE = 499
"""Status in the log of a request whose client has disconnected; nobody receives it."""


class Observed:
    """An ASGI application whose requests are logged and counted.

    Args:
        app: the application.
        metrics: counts requests.
        quiet: routes that are not logged, such as probes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, quiet: frozenset[str]) -> None:
        self._app, self._metrics, self._quiet = app, metrics, quiet
        self.draining = False
        """Whether connections are closed after their next answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_GONE
        state = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = state["request_id"] = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
                if self.draining:
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:  # already answered, by `on_failure`
            logging.getLogger("mobilevit").exception("%s %s failed", scope["method"], scope["path"])
        finally:
            self._record(scope, status, time.perf_counter() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.request(route, method, status, seconds)
        if route in self._quiet or not log.isEnabledFor(logging.INFO):
            return
        state, client = scope["state"], scope.get("client")
        fields = {
            "request_id": state["request_id"], "method": scope["method"], "path": scope["path"], "status": status,
            "ms": round(seconds * 1e3, 1), "images": state.get("images", 0), "client": client[0] if client else "",
        }  # fmt: skip
        text = "{client} {method} {path} {status} {ms} ms, {images} images, {request_id}"
        log.info("%s", _Later(text, fields), extra={"fields": fields})


class _Later:
    """A text that is formatted only if a handler uses it."""

    def __init__(self, text: str, fields: dict[str, object]) -> None:
        self._text, self._fields = text, fields

    def __str__(self) -> str:
        return self._text.format(**{name: _printable(value) for name, value in self._fields.items()})


def _printable(value: object) -> object:
    return value.encode("unicode_escape").decode() if isinstance(value, str) else value
