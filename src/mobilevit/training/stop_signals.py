"""Ctrl-C and SIGTERM as a wish that a loop can look at."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class StopSignals:
    """While open, Ctrl-C and SIGTERM set `requested` instead of ending the process; a second Ctrl-C ends it.

    Args:
        then: called at the first signal, too.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._then = then
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._then is not None and not self.requested:
            self._then()
        self.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop without saving", file=sys.stderr, flush=True)
