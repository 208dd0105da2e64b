"""Log to standard error: a line per request and event, as text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

ACCESS = "mobilevit.access"
"""The logger of requests; its records have `fields`."""


class JsonLines(logging.Formatter):
    """Format a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
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
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("mobilevit")
    root.handlers = [handler]
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # mistakes of clients, which have their answers
    logging.captureWarnings(True)  # Pillow's, about images of clients
