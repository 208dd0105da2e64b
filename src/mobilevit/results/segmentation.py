"""Results of segmentation: from logits at the size of the model's input to a class for every pixel of the image.

Letters used in shapes: K classes; H, W height and width of the image; h, w of the model's input.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import ModelCard
from mobilevit.files import Json
from mobilevit.imaging.drawing import background, class_colors, draw_label_map, save_image, with_legend
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import ImageInfo, Outputs, Result, float32

_LOGITS_AT_ONCE = 2**22
"""How many are interpolated at a time: 16 MB of float32, for images of any size."""


def decode_label_map(outputs: Outputs, placement: Placement) -> NDArray[np.uint8]:
    """Find the class of every pixel of the original image.

    Shape: "logits" (K, h, w), or "label_map" (h, w) if the model returns classes itself -> (H, W).
    """
    rows, columns = placement.filled  # without padding
    if "label_map" in outputs:
        small = Image.fromarray(outputs["label_map"][:rows, :columns].astype(np.uint8))
        return np.asarray(small.resize(placement.image[::-1], Image.Resampling.NEAREST))
    return _enlarge(float32(outputs["logits"])[:, :rows, :columns], placement.image)


def _enlarge(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Compute the best class after bilinear interpolation to (height, width).

    Interpolated logits are a weighted mean of those at four corners. A class that is the best at all four is the best
    in between, so only pixels between different classes have to be interpolated.
    """
    best = _best_class(logits)
    if size == best.shape:
        return best
    above, below, down = _taps(size[0], best.shape[0])
    left, right, across = _taps(size[1], best.shape[1])
    label_map: NDArray[np.uint8] = best[above][:, left]
    differs_across = best[:, left] != best[:, right]  # (h, W)
    differs_down = best[above] != best[below]  # (H, w)
    row, column = np.nonzero(differs_across[above] | differs_across[below] | differs_down[:, left])
    step = max(1, _LOGITS_AT_ONCE // len(logits))
    flat, width = logits.reshape(len(logits), -1), best.shape[1]  # indexing with one array is much faster
    for start in range(0, len(row), step):
        i, j = row[start : start + step], column[start : start + step]
        i_above, i_below, j_left, j_right = above[i] * width, below[i] * width, left[j], right[j]
        upper = _mix(flat[:, i_above + j_left], flat[:, i_above + j_right], across[j])
        lower = _mix(flat[:, i_below + j_left], flat[:, i_below + j_right], across[j])
        label_map[i, j] = _best_class(_mix(upper, lower, down[i]))
    return label_map


def _taps(length: int, input_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each pixel along an axis, find the two input pixels around its center, and the weight of the second.

    Centers are at half pixels, as in `torch.nn.functional.interpolate` with align_corners=False.
    """
    place = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(input_length / length)
    place = (place - np.float32(0.5)).clip(0, input_length - 1)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, input_length - 1), (place - before).astype(np.float32)


def _mix(first: NDArray[np.float32], second: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = first + (second - first) * weight
    return mixed


def _best_class(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Compute the argmax over the first axis, several times faster than numpy. Shape: (K, ...) -> (...)."""
    highest = logits[0].copy()
    best = np.zeros(highest.shape, np.uint8)
    for number in range(1, len(logits)):
        best[logits[number] > highest] = number
        np.maximum(highest, logits[number], out=highest)
    return best


@dataclass(frozen=True, kw_only=True)
class SegmentationResult(Result):
    """The class of every pixel of one image."""

    label_map: NDArray[np.uint8] = field(repr=False)
    """(H, W): index into `classes`."""

    covers_image: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"masks"})

    @classmethod
    def from_outputs(cls, outputs: Outputs, card: ModelCard, info: ImageInfo) -> Self:
        """Decode "logits" (K, h, w) or "label_map" (h, w)."""
        label_map = decode_label_map(outputs, card.preprocessing.placement(info.size))
        return cls(info=info, classes=card.classes, label_map=label_map)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, largest first."""
        counts = np.bincount(self.label_map.ravel(), minlength=len(self.classes)) / self.label_map.size
        return {self.classes[i]: float(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def _drawn(self, *, top: int, min_score: float | None, opacity: float) -> Image.Image:
        tinted = draw_label_map(self.image, self.label_map, self.classes, opacity=opacity)
        shares = {name: f"{share:.1%}" if share >= 0.0005 else "<0.1%" for name, share in self.shares.items()}
        texts = {self.classes.index(name): f"{name} {share}" for name, share in shares.items()}
        for label in background(self.classes):
            texts.pop(label, None)
        return with_legend(tinted, texts, len(self.classes))

    def mask(self) -> Image.Image:
        """Make a palette image of the label map: values are class indices, colors those of `draw`."""
        mask = Image.fromarray(self.label_map).convert("P")
        mask.putpalette([channel for color in class_colors(len(self.classes)) for channel in color])
        return mask

    def save_mask(self, path: str | os.PathLike[str]) -> None:
        """Write `mask` as a PNG."""
        save_image(self.mask(), path)

    def to_dict(self, *, top: int = 5, min_score: float | None = None) -> Json:
        """Return plain values for JSON, without the label map; `save_mask` writes that."""
        shares = {label: round(share, 6) for label, share in self.shares.items()}
        height, width = self.info.size
        return {"source": self.source, "width": width, "height": height, "shares": shares}

    def to_row(self, *, top: int = 3, min_score: float | None = None) -> Json:
        """Return the column shares: the label and share of each class that occurs."""
        return {"shares": [{"label": label, "share": share} for label, share in self.shares.items()]}

    def describe(self, *, top: int = 3, min_score: float | None = None) -> str:
        """List the share of each class in one line."""
        return "  ".join(f"{label} {share:.1%}" for label, share in self.shares.items())
