"""From an exception to what the user reads and the exit status."""

from __future__ import annotations

import dataclasses
import sys
import traceback
import typing

from mobilevit.errors import Interrupted, MobileViTError, with_flags


class UsageError(MobileViTError):
    """A command line that cannot be understood."""


def report_error(error: Exception, command: type | None = None) -> int:
    """Print a `MobileViTError` in one line and return 2; print any other exception with its traceback and return 1.

    Work that the user interrupted ends with its message and 1.

    Args:
        error: what was raised.
        command: the class of the command, whose options the message may name.
    """
    if isinstance(error, Interrupted):
        print(error, file=sys.stderr)
        return 1
    if isinstance(error, MobileViTError):
        # The message of a process that reads images comes with its traceback, the message itself last.
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
        message = with_flags(message, _options(command) if command else ())
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def _options(command: type) -> set[str]:
    """The names of a command's options, those of groups included."""
    names = set()
    for name, kind in typing.get_type_hints(command).items():
        names |= {name} | (_options(kind) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else set())
    return names
