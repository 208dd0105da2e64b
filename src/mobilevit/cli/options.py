"""Options that several commands have, understood in one place."""

from __future__ import annotations

from mobilevit.errors import MobileViTError


def height_and_width(image_size: tuple[int, ...]) -> tuple[int, int] | None:
    """Of `--image-size`: one number is both; None if it was not given.

    Raises:
        ValueError: more than two numbers.
    """
    if len(image_size) > 2:
        raise MobileViTError("--image-size takes one number, or height and width")
    return (image_size[0], image_size[-1]) if image_size else None
