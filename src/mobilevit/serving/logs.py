"""Standard error: a line for each request and each event, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

ACCESS = "mobilevit.access"
"""The logger of requests; its records carry `fields`."""


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told = {"time": time, "level": record.levelname.lower()}
        told |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=True)


def set_up_logs(log_format: Literal["auto", "json", "text"]) -> None:
    """Let all that is said go to standard error in one format."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("mobilevit")
    root.handlers = [handler]
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # strangers' mistakes, answered already
    logging.captureWarnings(True)  # of Pillow, about what strangers send
