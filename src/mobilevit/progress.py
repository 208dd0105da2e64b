"""Progress with speed and time left: a bar on a terminal, a line every 15 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as _Bar

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Count towards `total` and show the speed; `done` items were done before, in a resumed run."""

    def __init__(self, label: str, total: int, unit: str = "images", done: int = 0, *, silent: bool = False) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._first, self._silent = done, silent
        self._start = self._last_line = time.monotonic()
        self._bar: _Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._silent:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.label, total=self.total, completed=self.done, speed="", note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def per_second(self) -> float:
        """Items per second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more items; show `note`, such as the loss, after the speed."""
        self.done += count
        per_second = self.per_second
        speed = f"{per_second:,.0f} {self.unit}/s" if per_second >= 1000 else f"{per_second:.4g} {self.unit}/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, speed=speed, note=note)
            return
        now = time.monotonic()
        if not self._silent and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self.total - self.done) / max(per_second, 1e-9)
            line = f"{self.label}: {self.done}/{self.total}, {speed}, {left:.0f} s left  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)
