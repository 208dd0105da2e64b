"""The interface of all results, so that generic code does not depend on the task."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.files import Json
from mobilevit.imaging.drawing import save_image
from mobilevit.imaging.preprocessing import Preprocessing

Array = NDArray[Any]
"""An array with elements of any type."""

Outputs = Mapping[str, Array]
"""Named arrays that a session returns: "logits"; "boxes_xyxy" and "scores", perhaps with "selected"; or "label_map"."""


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """The image that a result belongs to."""

    source: str
    """The image's file, or the name it was given."""
    size: tuple[int, int]
    """(height, width) of the upright image."""
    image: Image.Image | None = field(default=None, repr=False)
    """The upright RGB image; None where it was not kept, as in the server and in bulk prediction."""


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """A model's prediction for one image.

    `draw`, `to_dict`, `to_row` and `describe` take the same options for every task and ignore those of other tasks:
    `top`, the number of labels of a classification; `min_score`, the lowest score of a detection; `opacity`, 0 to 1, of
    the colors of a segmentation.
    """

    info: ImageInfo
    classes: tuple[str, ...] = field(repr=False)

    covers_image: ClassVar[bool] = False
    """Whether every pixel gets a class; making such a result takes as long as running the model."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Options of commands and requests that have a meaning for this task only."""

    @property
    def source(self) -> str:
        """The image's file, or the name it was given."""
        return self.info.source

    @property
    def image(self) -> Image.Image:
        """The upright RGB image, as read."""
        assert self.info.image is not None, "the image was not kept"
        return self.info.image

    @classmethod
    def split(cls, outputs: Outputs) -> list[Outputs]:
        """Split the outputs of a batch into those of its images."""
        count = len(next(iter(outputs.values())))
        return [{name: array[number] for name, array in outputs.items()} for number in range(count)]

    @classmethod
    def check(cls, preprocessing: Preprocessing) -> None:
        """Refuse preprocessing that does not suit the task.

        Raises:
            MobileViTError: it crops, but the pixels at the border need a class as well.
        """
        if cls.covers_image and preprocessing.resize_mode == "crop":
            raise MobileViTError(
                "a cropped input does not show the border of the image; use `resize_mode` 'pad' or 'stretch'"
            )

    @classmethod
    def max_batch_size(cls, card: ModelCard) -> int:
        """Bound the batch so that its outputs take at most a quarter of a gigabyte of float32."""
        pixels = math.prod(card.preprocessing.size) if cls.covers_image else 1
        return max(1, 2**26 // (pixels * len(card.classes)))

    @classmethod
    @abstractmethod
    def from_outputs(cls, outputs: Outputs, card: ModelCard, info: ImageInfo) -> Self:
        """Decode the outputs for one image."""

    @abstractmethod
    def to_dict(self, *, top: int = 5, min_score: float | None = None) -> Json:
        """Return plain values for JSON."""

    @abstractmethod
    def to_row(self, *, top: int = 3, min_score: float | None = None) -> Json:
        """Return the columns of this result in a table of predictions."""

    @abstractmethod
    def describe(self, *, top: int = 3, min_score: float | None = None) -> str:
        """Summarize the result in one line."""

    @abstractmethod
    def _drawn(self, *, top: int, min_score: float | None, opacity: float) -> Image.Image:
        """Draw the result on a copy of the image."""

    def draw(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        top: int = 3,
        min_score: float | None = None,
        opacity: float = 0.55,
    ) -> Image.Image:
        """Draw the result on a copy of the image, and save that to `path` if given.

        Raises:
            MobileViTError: the suffix of `path` belongs to no image format.
        """
        drawn = self._drawn(top=top, min_score=min_score, opacity=opacity)
        if path is not None:
            save_image(drawn, path)
        return drawn


def float32(array: Array) -> NDArray[np.float32]:
    """Convert an output to float32, whatever precision the engine uses."""
    return array.astype(np.float32, copy=False)
