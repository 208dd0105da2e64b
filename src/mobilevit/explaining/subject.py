"""The prediction to explain: a class, an object or the class of a pixel, by the type of a model's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobilevit.card import ModelCard
from mobilevit.models.deeplabv3 import SegmentationOutput
from mobilevit.models.ssdlite import DetectionOutput, decode_boxes
from mobilevit.results.detection import DEFAULT_SCORE_THRESHOLD

Place = tuple[float, float]
"""(x, y) in the model's input, as shares of its width and height."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The prediction that is explained."""

    label: str
    score: float
    """Its probability."""
    target: Tensor
    """The scalar whose gradient shows the evidence. Shape: ()."""
    box_xyxy: Tensor | None = None
    """Detection: the object, in 0..1 of the input. Shape: (4,)."""


def subject_of(output: Tensor | DetectionOutput | SegmentationOutput, card: ModelCard, place: Place | None) -> Subject:
    """Choose what to explain of a model's output for one image; `place` is the pixel that the user asks about."""
    if isinstance(output, DetectionOutput):
        return _object(output, card, place)
    if isinstance(output, SegmentationOutput):
        return _segment(output, card, place)
    number = int(output[0].argmax())
    score = float(output[0].softmax(0)[number].detach())
    return Subject(label=card.classes[number], score=score, target=output[0, number])


def _object(output: DetectionOutput, card: ModelCard, place: Place | None) -> Subject:
    """Choose the strongest object; of those around the place, if one there is above the threshold."""
    scores = output.class_logits[0].detach().softmax(dim=-1)[:, 1:]
    boxes = decode_boxes(output.box_regression[0].detach(), output.anchors_cxcywh)
    if place is not None:
        x, y = place
        around = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        there = scores * around[:, None]
        threshold = DEFAULT_SCORE_THRESHOLD if card.score_threshold is None else card.score_threshold
        scores = there if float(there.max()) >= threshold else scores
    anchor, number = divmod(int(scores.argmax()), scores.shape[1])
    return Subject(
        label=card.classes[number],
        score=float(scores[anchor, number]),
        target=output.class_logits[0, anchor, number + 1],
        box_xyxy=boxes[anchor],
    )


def _segment(output: SegmentationOutput, card: ModelCard, place: Place | None) -> Subject:
    """Choose the class at the place, or the class that covers the most, as the mean over its pixels."""
    logits = output.logits[0]
    classes, height, width = logits.shape
    if place is None:
        label_map = logits.argmax(0)
        number = int(torch.bincount(label_map.flatten(), minlength=classes).argmax())
        pixels = label_map == number
    else:
        pixels = torch.zeros(height, width, dtype=torch.bool, device=logits.device)
        pixels[min(int(place[1] * height), height - 1), min(int(place[0] * width), width - 1)] = True
        number = int(logits[:, pixels].argmax())
    return Subject(
        label=card.classes[number],
        score=float(logits.softmax(0)[number][pixels].mean().detach()),
        target=logits[number][pixels].mean(),
    )
