"""Errors that are raised on purpose: a mistake of the user, in one line with a remedy.

Messages name arguments in backticks (`batch_size`); the command line shows them as its flags (--batch-size). Any other
exception is a bug of this package: the command line prints its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MobileViTError(ValueError):
    """A mistake of the user: a wrong argument, file, checkpoint or data set."""


class ImageError(MobileViTError):
    """An image that cannot be read; the message names it and says why."""


class TooManyPixelsError(ImageError):
    """An image that may be intact, but is too large to decode."""


class MissingPackageError(MobileViTError):
    """A package that is not installed; the message says how to install it."""


class Interrupted(Exception):  # noqa: N818, not an error: the user asked for it
    """Work that the user stopped, after it was saved; the message says how to go on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word: "did you mean train? ", or nothing if none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def unknown(kind: str, name: str, known: Iterable[str], *, meant: str | None = None) -> MobileViTError:
    """Make the error for a name that does not exist: `meant`, or else the nearest, is suggested, and all are listed."""
    known = list(known)
    near = did_you_mean(meant or name, known)
    return MobileViTError(f"unknown {kind} {name!r}; {near}{'There' if near else 'there'} are {', '.join(known)}")


def some(names: Sequence[str], limit: int = 5) -> str:
    """List the first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the message of an exception in one line of at most `limit` characters, or its type if it has none.

    An error of the system gives its reason alone, such as "Permission denied", as messages name the file themselves.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(reason.split())[:limit] or type(error).__name__


def with_flags(message: str, arguments: Iterable[str]) -> str:
    """Show the arguments that a message names in backticks as flags of the command line."""
    known = set(arguments)
    return re.sub(r"`(\w+)`", lambda m: f"--{m[1].replace('_', '-')}" if m[1] in known else m[1], message)
