"""Add to every request an id, a line in the log, metrics and headers; write the log as text or JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobilevit.serving import metrics

log = logging.getLogger("mobilevit")

CLIENT_GONE = 499
"""Status in the log of a request whose client has disconnected; nobody receives it."""

_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})


class Observed:
    """An ASGI application whose requests are logged and counted."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.draining = False
        """Whether connections are closed after their next answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_GONE
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

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
            log.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            _record(scope, status, time.perf_counter() - start)


def _record(scope: Scope, status: int, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", "other")
    method = scope["method"] if scope["method"] in _METHODS else "other"
    metrics.REQUESTS.labels(route, method, status).inc()
    metrics.SECONDS.labels(route).observe(seconds)
    if route in _PROBES:
        return
    state, client = scope["state"], scope.get("client")
    fields = {
        "request_id": state["request_id"], "method": scope["method"], "path": scope["path"], "status": status,
        "ms": round(seconds * 1e3, 1), "images": state.get("images", 0), "client": client[0] if client else "",
    }  # fmt: skip
    path = scope["path"].encode("unicode_escape").decode()  # a line end would forge a line
    text = "{client} {method} {path} {status} {ms} ms, {images} images, {request_id}"
    log.info(text.format(**fields | {"path": path}), extra={"fields": fields})


class _JsonLines(logging.Formatter):
    """Format a record as one line of JSON: its `fields`, or its message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower()}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def set_up_logs(log_format: Literal["auto", "json", "text"]) -> None:
    """Send all log records of this process to standard error in one format."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger().handlers = [handler]
    log.handlers, log.propagate = [], True
    log.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # mistakes of clients, which have their answers
    logging.captureWarnings(True)  # Pillow's, about images of clients
