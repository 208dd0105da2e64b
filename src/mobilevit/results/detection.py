"""Results of detection: from boxes and scores at every anchor to objects.

Letters used in shapes: A anchors, K classes without the background, N objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.card import ModelCard
from mobilevit.files import Json
from mobilevit.imaging.drawing import class_colors, draw_boxes
from mobilevit.imaging.preprocessing import Placement
from mobilevit.results.base import ImageInfo, Outputs, Result, float32

DEFAULT_SCORE_THRESHOLD = 0.3
"""The lowest score shown if the model's card has no threshold."""

# The published settings: boxes with a higher score are candidates, up to a number in each class; one whose IoU with a
# better box of its class is higher is dropped.
SCORE_THRESHOLD, IOU_THRESHOLD = 0.01, 0.5
MAX_CANDIDATES, MAX_DETECTIONS = 400, 200
_AT_ONCE = 400


class Detections(NamedTuple):
    """Objects found in one image, best first."""

    boxes_xyxy: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in 0..1 of the model's input; beyond that for objects that are cut off."""
    scores: NDArray[np.float32]
    """(N,): probability of the class."""
    class_ids: NDArray[np.int64]
    """(N,): 0..K-1."""


def find_objects(boxes_xyxy: NDArray[np.float32], scores: NDArray[np.float32]) -> Detections:
    """Drop improbable boxes and, of overlapping boxes of one class, keep the best (non-maximum suppression).

    The result equals that of suppressing each class separately and then sorting. The candidates of all classes are
    visited together, some hundred at a time, until there are enough objects.

    Shape: boxes (A, 4), scores (A, K) without the background.
    """
    boxes, num_classes, flat = boxes_xyxy.astype(np.float64), scores.shape[1], scores.ravel()
    kept = np.zeros(0, np.int64)
    num_seen = np.zeros(num_classes, np.int64)
    for places in _candidates(flat):
        classes = places % num_classes
        places = places[num_seen[classes] + _rank_in_class(classes) < MAX_CANDIDATES]
        num_seen += np.bincount(classes, minlength=num_classes)
        hidden: NDArray[np.bool_] = np.any(_overlap(boxes, kept, places, num_classes), axis=0)
        hides = _overlap(boxes, places, places, num_classes)
        chosen: list[int] = []
        for number in range(len(places)):
            if not hidden[number]:
                chosen.append(number)
                hidden |= hides[number]
        kept = np.concatenate([kept, places[chosen]])[:MAX_DETECTIONS]
        if len(kept) == MAX_DETECTIONS:
            break
    return Detections(boxes_xyxy[kept // num_classes], flat[kept], kept % num_classes)


def _candidates(flat: NDArray[np.float32]) -> Iterator[NDArray[np.int64]]:
    """Yield the places of scores above the threshold, the highest first, some hundred at a time."""
    places = np.flatnonzero(flat > SCORE_THRESHOLD)
    if len(places) > 8 * _AT_ONCE:  # the first are usually enough: find them without sorting all
        values = flat[places]
        least = np.partition(values, -_AT_ONCE)[-_AT_ONCE]
        first = places[values > least]
        yield first[np.argsort(-flat[first], kind="stable")]
        places = places[values <= least]
    places = places[np.argsort(-flat[places], kind="stable")]
    for start in range(0, len(places), _AT_ONCE):
        yield places[start : start + _AT_ONCE]


def _rank_in_class(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the elements of the same class before each element. Shape: (n,) -> (n,)."""
    order = np.argsort(classes, kind="stable")
    rank = np.empty_like(classes)
    rank[order] = np.arange(len(classes)) - np.searchsorted(classes[order], classes[order])
    return rank


def _overlap(
    boxes: NDArray[np.float64], a: NDArray[np.int64], b: NDArray[np.int64], num_classes: int
) -> NDArray[np.bool_]:
    """Return which boxes of the same class overlap too much; a and b are indices anchor * K + class.

    Shape: boxes (A, 4), a (n,), b (m,) -> (n, m).
    """
    overlap: NDArray[np.bool_] = np.equal.outer(a % num_classes, b % num_classes)
    row, column = np.nonzero(overlap)  # most pairs are of different classes
    first, second = boxes[a // num_classes][row], boxes[b // num_classes][column]
    width = np.minimum(first[:, 2], second[:, 2]) - np.maximum(first[:, 0], second[:, 0])
    height = np.minimum(first[:, 3], second[:, 3]) - np.maximum(first[:, 1], second[:, 1])
    shared = width.clip(min=0) * height.clip(min=0)
    first_area, second_area = ((part[:, 2] - part[:, 0]) * (part[:, 3] - part[:, 1]) for part in (first, second))
    overlap[row, column] = shared > IOU_THRESHOLD * (first_area + second_area - shared)
    return overlap


def decode_detections(outputs: Outputs) -> Detections:
    """Find the objects in the outputs for one image; "selected" is there if the model suppresses boxes itself."""
    boxes, scores = float32(outputs["boxes_xyxy"]), float32(outputs["scores"])
    if "selected" not in outputs:
        return find_objects(boxes, scores)
    _, classes, anchors = outputs["selected"].T
    order = np.argsort(-scores[anchors, classes], kind="stable")[:MAX_DETECTIONS]
    anchors, classes = anchors[order], classes[order]
    return Detections(boxes[anchors], scores[anchors, classes], classes.astype(np.int64))


def to_pixels(detections: Detections, placement: Placement) -> Detections:
    """Map boxes to pixels of the original image, cut off at its border."""
    boxes = placement.to_image(detections.boxes_xyxy.astype(np.float64))
    return detections._replace(boxes_xyxy=boxes.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class DetectionResult(Result):
    """The objects found in one image, best first."""

    boxes_xyxy: NDArray[np.float32]
    """(N, 4): left, top, right, bottom in pixels of the image."""
    scores: NDArray[np.float32]
    """(N,): probability of the class."""
    class_ids: NDArray[np.int64]
    """(N,): index into `classes`."""
    score_threshold: float
    """The lowest score that `draw`, `to_dict` and `describe` show by default; from the checkpoint."""

    options: ClassVar[frozenset[str]] = frozenset({"min_score", "coco"})

    @classmethod
    def split(cls, outputs: Outputs) -> list[Outputs]:
        """Split the outputs of a batch; rows of "selected" (M, 3) are image, class and anchor."""
        if "selected" not in outputs:
            return super().split(outputs)
        boxes, scores, selected = outputs["boxes_xyxy"], outputs["scores"], outputs["selected"]
        return [
            {"boxes_xyxy": boxes[number], "scores": scores[number], "selected": selected[selected[:, 0] == number]}
            for number in range(len(boxes))
        ]

    @classmethod
    def from_outputs(cls, outputs: Outputs, card: ModelCard, info: ImageInfo) -> Self:
        """Decode "boxes_xyxy" (A, 4), "scores" (A, K) and, if present, "selected" (M, 3)."""
        found = to_pixels(decode_detections(outputs), card.preprocessing.placement(info.size))
        threshold = DEFAULT_SCORE_THRESHOLD if card.score_threshold is None else card.score_threshold
        return cls(info=info, classes=card.classes, score_threshold=threshold, **found._asdict())

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """The class name of each object."""
        return [self.classes[i] for i in self.class_ids]

    def above(self, min_score: float | None = None) -> Self:
        """Keep only objects with at least this score; None: the result's own threshold."""
        keep = self.scores >= (self.score_threshold if min_score is None else min_score)
        return replace(self, boxes_xyxy=self.boxes_xyxy[keep], scores=self.scores[keep], class_ids=self.class_ids[keep])

    def _drawn(self, *, top: int, min_score: float | None, opacity: float) -> Image.Image:
        shown = self.above(min_score)
        colors = class_colors(len(self.classes))
        texts = [f"{label} {score:.0%}" for label, score in zip(shown.labels, shown.scores, strict=True)]
        return draw_boxes(self.image, shown.boxes_xyxy, texts, [colors[i] for i in shown.class_ids])

    def _rows(self, min_score: float | None) -> list[tuple[int, float, list[float]]]:
        """Class, score and box of each object from a score up."""
        shown = self.above(min_score)
        return list(zip(shown.class_ids.tolist(), shown.scores.tolist(), shown.boxes_xyxy.tolist(), strict=True))

    def to_dict(self, *, top: int = 5, min_score: float | None = None) -> Json:
        """Return plain values for JSON; boxes are in pixels with two decimals."""
        found = [
            {"label": self.classes[i], "score": round(score, 6), "box_xyxy": [round(edge, 2) for edge in box]}
            for i, score, box in self._rows(min_score)
        ]
        height, width = self.info.size
        return {"source": self.source, "width": width, "height": height, "detections": found}

    def to_row(self, *, top: int = 3, min_score: float | None = None) -> Json:
        """Return the column detections: label, score, left, top, right and bottom of each object."""
        found = [
            {"label": self.classes[i], "score": score, "left": left, "top": top, "right": right, "bottom": bottom}
            for i, score, (left, top, right, bottom) in self._rows(min_score)
        ]
        return {"detections": found}

    def to_coco(
        self, image_id: int, *, category_ids: Sequence[int] | None = None, min_score: float = 0.0
    ) -> list[Json]:
        """Return entries of a COCO results file: boxes as left, top, width, height.

        `image_id` and `category_ids` are the numbers of the image and of each class in the annotations, by default 1,
        2, 3 ... for the classes. COCO's evaluation wants objects of all scores.
        """
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[class_id],
                "bbox": [round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 6),
            }
            for class_id, score, (left, top, right, bottom) in self._rows(min_score)
        ]

    def describe(self, *, top: int = 3, min_score: float | None = None) -> str:
        """Count the objects of each class in one line."""
        counts = Counter(self.above(min_score).labels)
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"
