"""Options that several commands share."""

from __future__ import annotations

from mobilevit.errors import MobileViTError


def height_and_width(image_size: tuple[int, ...]) -> tuple[int, int] | None:
    """Read `--image-size`, where one number is both height and width; None if it was not given.

    Raises:
        MobileViTError: there are more than two numbers.
    """
    if len(image_size) > 2:
        raise MobileViTError("`image_size` is one number, or height and width")
    return (image_size[0], image_size[-1]) if image_size else None
