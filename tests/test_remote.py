from collections.abc import Callable

import fsspec
import pytest

from mobilevit import remote
from mobilevit.errors import MobileViTError
from mobilevit.remote import file_system, is_url, read_bytes, with_retries


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which tests do not sit out."""
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


class AnswerError(Exception):
    """As the client of a server raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='no'")
        self.status = status


def failing(*errors: Exception) -> tuple[Callable[[], str], list[Exception]]:
    """Raises these errors one after the other, then answers."""
    left = list(errors)

    def act() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return act, left


def test_urls() -> None:
    assert is_url("s3://bucket/a")
    assert is_url("https://example.org")
    assert not is_url("C:\\data")
    assert not is_url("a/b.tar")


def test_a_server_that_recovers_is_asked_again(waits: list[float]) -> None:
    act, _ = failing(AnswerError(503), TimeoutError(), AnswerError(429), ConnectionError("reset"), AnswerError(500))
    assert with_retries("http://x/a", act) == "answer"
    assert waits == [0.5, 1, 2, 4, 8]


def test_a_server_that_is_down(waits: list[float]) -> None:
    act, left = failing(*[AnswerError(503)] * 7)
    with pytest.raises(MobileViTError, match=r"http://x/a: cannot be fetched after 6 tries \(503.*is the server up\?"):
        with_retries("http://x/a", act)
    assert (len(waits), len(left)) == (5, 1)


@pytest.mark.parametrize("error", [AnswerError(403), AnswerError(401), PermissionError("no key")])
def test_no_access_is_not_asked_for_again(error: Exception, waits: list[float]) -> None:
    act, _ = failing(error)
    with pytest.raises(MobileViTError, match=r"http://x/a: access is denied .*look at address and credentials"):
        with_retries("http://x/a", act)
    assert waits == []


@pytest.mark.parametrize("error", [FileNotFoundError(), IsADirectoryError(), OSError(28, "No space left on device")])
def test_what_does_not_change_by_waiting(error: Exception, waits: list[float]) -> None:
    act, _ = failing(error)
    with pytest.raises(type(error)):
        with_retries("http://x/a", act)
    assert waits == []


def test_reading() -> None:
    fsspec.filesystem("memory").pipe("/remote/a", b"bytes")
    assert read_bytes("memory://remote/a") == b"bytes"
    with pytest.raises(FileNotFoundError):
        read_bytes("memory://remote/none")
    with pytest.raises(MobileViTError, match=r"nothing://x: cannot be read from .*fsspec lists what can be"):
        file_system("nothing://x")
