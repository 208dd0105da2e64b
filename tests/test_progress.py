import contextlib
import os
import sys
from collections.abc import Callable

import pytest

from mobilevit.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_without_a_terminal_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("epoch 1/2", 200) as progress:
        for _ in range(20):
            clock.now += 4
            progress.advance(10, "loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"epoch 1/2: {done}/200, 2.5 images/s, {left} s left  loss 0.5"
        for done, left in ((40, 64), (80, 48), (120, 32), (160, 16), (200, 0))
    ]


def test_short_work_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluate", 10) as progress:
        clock.now += 14.9
        progress.advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_line_without_a_note_ends_cleanly(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("export", 4, "files") as progress:
        clock.now += 16
        progress.advance(1)
    assert capsys.readouterr().err == "export: 1/4, 0.0625 files/s, 48 s left\n"


def test_what_was_done_before_does_not_count_for_the_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("epoch 3/3", 1000, done=900) as progress:
        clock.now += 20
        progress.advance(40)
        assert progress.per_second == 2
    assert progress.done == 940
    assert capsys.readouterr().err == "epoch 3/3: 940/1000, 2 images/s, 30 s left\n"


@pytest.mark.parametrize(("count", "speed"), [(3, "0.15"), (19_990, "999.5"), (20_000, "1,000"), (246_914, "12,346")])
def test_speeds_are_legible(clock: Clock, capsys: pytest.CaptureFixture[str], count: int, speed: str) -> None:
    with Progress("predict", 250_000) as progress:
        clock.now += 20
        progress.advance(count)
    assert f", {speed} images/s, " in capsys.readouterr().err


def test_no_time_passed_and_nothing_done(clock: Clock) -> None:
    progress = Progress("x", 10)
    assert progress.per_second == 0
    clock.now += 100
    assert progress.per_second == 0


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> str:
    """What a terminal of 120 columns is sent while `work` runs with it as standard error."""
    pty = pytest.importorskip("pty")
    screen, keyboard = pty.openpty()
    os.set_blocking(screen, False)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    sent = b""
    with os.fdopen(keyboard, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        work()
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += os.read(screen, 65536)
    os.close(screen)
    return sent.decode()


def test_a_bar_on_a_terminal_that_goes_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with Progress("epoch 1/2", 40, done=10) as progress:
            progress.advance(15, "loss 0.25")

    text = on_a_terminal(monkeypatch, work)
    assert "epoch 1/2" in text
    assert "25/40" in text
    assert "images/s" in text
    assert "loss 0.25" in text
    assert "s left" not in text  # no lines besides the bar
    assert text.rindex("\x1b[2K") > text.rindex("25/40")  # erased at the end
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_the_terminal_is_itself_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with contextlib.suppress(RuntimeError), Progress("epoch 1/2", 40) as progress:
            progress.advance(1)
            raise RuntimeError

    text = on_a_terminal(monkeypatch, work)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
