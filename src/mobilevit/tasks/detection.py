"""Detection: loss, postprocessing, and the typed result of a prediction.

B images in a batch, A anchors, N objects in the fullest image of the batch, K classes without the background.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.imaging.drawing import class_colors, draw_boxes, save_image
from mobilevit.imaging.preprocessing import Placement
from mobilevit.models.ssdlite import DetectionOutput, decode_boxes, encode_boxes

NO_OBJECT = -1
"""Label of the rows that fill up images with fewer objects than the fullest of their batch."""

NEGATIVES_PER_POSITIVE = 3

# The published settings of `postprocess`.
SCORE_THRESHOLD, IOU_THRESHOLD = 0.01, 0.5
MAX_CANDIDATES, MAX_DETECTIONS = 400, 200


def match_anchors(
    boxes_cxcywh: Tensor, labels: Tensor, anchors_cxcywh: Tensor, *, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Decide which anchor has to find which object (arXiv:1512.02325, section 2.2).

    An anchor is given the object it overlaps most, if by `iou_threshold` at least; every object also gets the anchor
    that overlaps it most, whatever the overlap.

    Shape: boxes (B, N, 4), labels (B, N) of 0..K-1 or `NO_OBJECT`, anchors (A, 4) -> targets (B, A), 0 for background
    and 1 + label otherwise; boxes (B, A, 4).
    """
    from torchvision.ops import box_convert, box_iou

    real = labels != NO_OBJECT
    num_anchors = len(anchors_cxcywh)
    anchors = box_convert(anchors_cxcywh, "cxcywh", "xyxy")
    overlap = box_iou(box_convert(boxes_cxcywh, "cxcywh", "xyxy"), anchors)  # (B, N, A)
    overlap = overlap.masked_fill(~real[..., None], -1)
    best_overlap, best_object = overlap.max(dim=1)  # (B, A)
    # Rows that are no objects write into an anchor past the last one.
    best_anchor = overlap.argmax(dim=2).masked_fill(~real, num_anchors)  # (B, N)
    best_overlap = F.pad(best_overlap, (0, 1)).scatter(1, best_anchor, 2.0)[:, :-1]
    numbers = torch.arange(labels.shape[1], device=labels.device).expand_as(best_anchor)
    best_object = F.pad(best_object, (0, 1)).scatter(1, best_anchor, numbers)[:, :-1]

    targets = labels.gather(1, best_object).add(1).masked_fill(best_overlap < iou_threshold, 0)
    matched = boxes_cxcywh.gather(1, best_object[..., None].expand(-1, -1, 4))
    return targets, matched


def detection_loss(output: DetectionOutput, boxes_cxcywh: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes plus smooth L1 of boxes, per matched anchor (arXiv:1512.02325, section 2.2).

    The background learns from the anchors it is most mistaken at, three for each matched one in every image; an
    image without objects counts as one with a single matched anchor.

    Shape: boxes (B, N, 4), center and size in 0..1; labels (B, N) of 0..K-1, `NO_OBJECT` in rows that only fill up
    -> scalar, in float32.
    """
    logits, regression = output.class_logits.float(), output.box_regression.float()
    targets, matched = match_anchors(boxes_cxcywh, labels, output.anchors_cxcywh)
    positive = targets > 0
    num_positive = positive.sum(dim=1, keepdim=True)  # (B, 1)

    class_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    mistaken = class_loss.detach().masked_fill(positive, -1)
    rank = mistaken.argsort(dim=1, descending=True).argsort(dim=1)
    negative = (rank < NEGATIVES_PER_POSITIVE * num_positive.clamp(min=1)) & ~positive

    wanted = encode_boxes(matched, output.anchors_cxcywh)
    box_loss = F.smooth_l1_loss(regression, wanted, reduction="none").sum(dim=2)
    nothing = class_loss.new_zeros(())  # not a product with the mask: what is masked out need not be finite
    total = torch.where(positive | negative, class_loss, nothing).sum() + torch.where(positive, box_loss, nothing).sum()
    return total / num_positive.clamp(min=1).sum()


class DecodedOutput(NamedTuple):
    """A box and probabilities at every anchor, for B images; what exported detectors give."""

    boxes_xyxy: Tensor
    """(B, A, 4): left, top, right, bottom in 0..1 of the model's input, beyond it for cut-off objects."""
    scores: Tensor
    """(B, A, K): probabilities, without the background's."""


def decode(output: DetectionOutput) -> DecodedOutput:
    """Move and stretch the anchors, and turn logits into probabilities; in float32."""
    scores = output.class_logits.float().softmax(dim=2)[..., 1:]
    return DecodedOutput(decode_boxes(output.box_regression.float(), output.anchors_cxcywh), scores)


class Detections(NamedTuple):
    """Objects found in one image, the surest first."""

    boxes_xyxy: Tensor
    """(N, 4): left, top, right, bottom in 0..1 of the model's input."""
    scores: Tensor
    """(N,): probability of the class."""
    class_ids: Tensor
    """(N,): 0..K-1."""


def postprocess(
    output: DetectionOutput | DecodedOutput | list[Detections],
    *,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_candidates: int = MAX_CANDIDATES,
    max_detections: int = MAX_DETECTIONS,
) -> list[Detections]:
    """From anchors to objects: decode, drop the improbable, and of overlapping boxes of a class keep the surest.

    The defaults are the published ones. The same as suppressing every class by itself and then sorting, but the work
    begins with the surest candidates of all classes and ends when there are enough.

    Args:
        output: of the model, for B images; where it has suppressed boxes itself, they are returned as they are.
        score_threshold: least probability.
        iou_threshold: overlap from which on two boxes of one class count as one.
        max_candidates: the surest anchors that are looked at, of each class.
        max_detections: the surest objects that are returned, of each image.

    Returns:
        One `Detections` an image.
    """
    if isinstance(output, list):
        return output
    decoded = decode(output) if isinstance(output, DetectionOutput) else output
    return [
        _suppress(probabilities, boxes, score_threshold, iou_threshold, max_candidates, max_detections)
        for boxes, probabilities in zip(*decoded, strict=True)
    ]


def _suppress(
    probabilities: Tensor,
    boxes: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> Detections:
    """Shape: probabilities (A, K), boxes (A, 4)."""
    from torchvision.ops import nms  # half a second of import that classification need not wait for

    num_classes = probabilities.shape[1]
    flat = probabilities.flatten()
    # A box is suppressed by surer ones only: what survives among the surest n survives among all. The first n of no
    # more than `max_candidates` cannot have too many of one class.
    count = max_candidates
    while True:
        scores, chosen = flat.topk(min(count, len(flat)))
        probable = scores > score_threshold
        scores, chosen = scores[probable], chosen[probable]
        was_all = len(scores) < count
        anchors, classes = chosen // num_classes, chosen % num_classes
        if count > max_candidates:
            few = _rank_in_class(classes, num_classes) < max_candidates
            scores, anchors, classes = scores[few], anchors[few], classes[few]
        candidates = boxes[anchors]
        # Classes moved apart do not overlap; far apart, float32 is too coarse for small boxes.
        exact = candidates if candidates.device.type == "mps" else candidates.double()
        step = exact.abs().max() * 2 + 1 if len(exact) else 1.0  # boxes can reach beyond 0..1
        kept = nms(exact + (classes * step)[:, None], scores.to(exact.dtype), iou_threshold)
        if was_all or len(kept) >= max_detections:
            kept = kept[:max_detections]
            return Detections(candidates[kept], scores[kept], classes[kept])
        count *= 2


def _rank_in_class(classes: Tensor, num_classes: int) -> Tensor:
    """How many of the same class stand before each. Shape: (n,) -> (n,)."""
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes, minlength=num_classes)
    firsts = counts.cumsum(0) - counts
    rank = torch.empty_like(classes)
    rank[order] = torch.arange(len(classes), device=classes.device) - firsts[classes[order]]
    return rank


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """The objects a model finds in one image, the surest first."""

    source: str
    """The image's file, or what it was called."""
    classes: tuple[str, ...] = field(repr=False)
    boxes_xyxy: np.ndarray
    """float32 (N, 4): left, top, right, bottom in pixels of the image."""
    scores: np.ndarray
    """float32 (N,): probability of the class."""
    class_ids: np.ndarray
    """int64 (N,): index into `classes`."""
    score_threshold: float
    """What `draw`, `to_dict` and printing leave out, unless told otherwise; comes from the checkpoint."""
    image: Image.Image = field(repr=False)
    """The upright RGB image, as read."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """Class name of each object."""
        return [self.classes[i] for i in self.class_ids]

    def above(self, min_score: float | None = None) -> DetectionResult:
        """Only the objects with at least this score; the result's own threshold if none is given."""
        keep = self.scores >= (self.score_threshold if min_score is None else min_score)
        return DetectionResult(
            source=self.source,
            classes=self.classes,
            boxes_xyxy=self.boxes_xyxy[keep],
            scores=self.scores[keep],
            class_ids=self.class_ids[keep],
            score_threshold=self.score_threshold,
            image=self.image,
        )

    def draw(self, path: str | os.PathLike[str] | None = None, *, min_score: float | None = None) -> Image.Image:
        """The image with boxes, names and scores; written to `path` if given."""
        shown = self.above(min_score)
        colors = class_colors(len(self.classes))
        texts = [f"{label} {score:.0%}" for label, score in zip(shown.labels, shown.scores, strict=True)]
        drawn = draw_boxes(self.image, shown.boxes_xyxy, texts, [colors[i] for i in shown.class_ids])
        if path is not None:
            save_image(drawn, path)
        return drawn

    def to_dict(self, *, min_score: float | None = None) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = self.above(min_score)
        rows = zip(shown.labels, shown.scores.tolist(), shown.boxes_xyxy.tolist(), strict=True)
        return {
            "source": self.source,
            "width": self.image.width,
            "height": self.image.height,
            "detections": [
                {"label": label, "score": round(score, 6), "box_xyxy": [round(v, 2) for v in box]}
                for label, score, box in rows
            ],
        }

    def to_coco(
        self, image_id: int, *, category_ids: Sequence[int] | None = None, min_score: float = 0.0
    ) -> list[dict[str, Any]]:
        """Entries of a COCO results file: boxes as left, top, width, height.

        Args:
            image_id: of the image in the annotations.
            category_ids: of each class in the annotations; 1, 2, 3 ... if not given.
            min_score: leave out objects below; COCO's evaluation wants all.
        """
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        shown = self.above(min_score)
        return [
            {
                "image_id": image_id,
                "category_id": ids[class_id],
                "bbox": [round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2)],
                "score": round(score, 6),
            }
            for class_id, score, (left, top, right, bottom) in zip(
                shown.class_ids.tolist(), shown.scores.tolist(), shown.boxes_xyxy.tolist(), strict=True
            )
        ]

    def describe(self, min_score: float | None = None) -> str:
        """One line for people: how many of what."""
        shown = self.above(min_score)
        names = shown.labels
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"


def to_pixels(detections: Detections, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes in pixels of the original image and cut at its border, scores, class numbers; as numpy arrays.

    Shape: (N, 4), (N,), (N,).
    """
    boxes = placement.to_image(detections.boxes_xyxy.double().numpy(force=True))
    return boxes.astype(np.float32), detections.scores.numpy(force=True), detections.class_ids.numpy(force=True)
