"""Detection: its data, loss and evaluation.

B images in a batch, A anchors, N objects in the fullest image of the batch, K classes without the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mobilevit.errors import MobileViTError, some
from mobilevit.imaging.drawing import class_colors, draw_boxes, draw_outlines
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.ssdlite import DetectionOutput, encode_boxes
from mobilevit.results.detection import DetectionResult
from mobilevit.tasks.detection_report import MOST_IN_LEGEND, DetectionMeter
from mobilevit.tasks.targets import Boxes
from mobilevit.tasks.task import Objective, Task, TrainingSettings
from mobilevit.tasks.transforms import DetectionTransform, collate_boxes

NO_OBJECT = -1
"""Label of the rows that fill up images with fewer objects than the fullest of their batch."""

NEGATIVES_PER_POSITIVE = 3


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

    Shape: boxes and labels as for `match_anchors` -> scalar, in float32.
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


class DetectionTask(Task[Boxes, Boxes]):
    """Find objects and their classes; targets are boxes."""

    name = "detection"
    result_type = DetectionResult
    score_name = "ap"
    score_title = "AP"
    limits = "Objects of other classes are missed, or mistaken for one of its classes."
    usage = "result.describe()"
    counted = "objects (images)"
    most_in_legend = MOST_IN_LEGEND  # more classes are named at their boxes

    def check_classes(self, origin: str, classes: Sequence[str], targets: Sequence[Boxes]) -> None:
        if not any(self.count(targets, len(classes))):
            raise MobileViTError(f"{origin}: no objects of {some(classes)}; add some or remove the class")

    def count(self, targets: Sequence[Boxes], num_classes: int) -> list[int]:
        """Count the objects of each class, without crowds."""
        labels = [target.labels[~target.crowd] for target in targets]
        counts: list[int] = np.bincount(
            np.concatenate([np.zeros(0, np.int64), *labels]), minlength=num_classes
        ).tolist()
        return counts

    def stratum(self, target: Boxes, counts: Sequence[int]) -> int | None:
        """Choose the rarest class in the image, so that rare classes are in both parts."""
        return min(target.labels[~target.crowd].tolist(), key=lambda i: (counts[i], i), default=None)

    def describe_target(self, target: Boxes, classes: Sequence[str]) -> str:
        rows = zip(target.labels.tolist(), target.xyxy.tolist(), target.crowd.tolist(), strict=True)
        return repr([(classes[label], box, crowd) for label, box, crowd in rows])

    def relabel(self, target: Boxes, new: NDArray[np.int64]) -> Boxes:
        """Renumber the objects; crowds of classes that the model does not know are dropped."""
        labels = new[target.labels]
        known = labels >= 0
        return Boxes(
            xyxy=target.xyxy[known], labels=labels[known], crowd=target.crowd[known], areas=target.areas[known]
        )

    def draw_target(
        self, target: Boxes, image: Image.Image, scale: float, classes: Sequence[str]
    ) -> tuple[Image.Image, set[int]]:
        counted = ~target.crowd  # crowds are drawn dashed
        labels = target.labels[counted].tolist()
        colors = class_colors(len(classes))
        texts = ["" if len(classes) <= MOST_IN_LEGEND else classes[label] for label in labels]
        image = draw_outlines(image, target.xyxy[target.crowd] * scale)
        return draw_boxes(image, target.xyxy[counted] * scale, texts, [colors[n] for n in labels]), set(labels)

    def objective(
        self,
        settings: TrainingSettings,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        targets: Sequence[Boxes],
        device: torch.device,
    ) -> Objective:
        return Objective(
            transform=DetectionTransform(
                preprocessing=preprocessing,
                settings=settings.detection,
                flip=settings.flip,
                photometric_distortion=settings.photometric_distortion,
            ),
            collate=collate_boxes,
            loss=lambda output, targets: detection_loss(output, targets.boxes_cxcywh, targets.labels),
        )

    def head(self, settings: TrainingSettings) -> None:
        """Leave the head to the weights."""

    def read_truth(self, target: Boxes, _: tuple[int, int]) -> Boxes:
        return target

    def new_meter(self, classes: Sequence[str]) -> DetectionMeter:
        return DetectionMeter(classes)


DETECTION = DetectionTask()
