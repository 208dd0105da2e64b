"""Loss of detection.

B images in a batch, A anchors, N objects in the fullest image of the batch, K classes without the background.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mobilevit.models.ssdlite import DetectionOutput, encode_boxes

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
