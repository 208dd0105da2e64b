"""The prediction to explain: a class, an object or the class of a pixel, by the type of a model's output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

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


@singledispatch
def subject_of(output: object, card: ModelCard, place: Place | None) -> Subject:  # noqa: ARG001, used below
    """Choose what to explain of a model's output for one image.

    Args:
        output: logits, `DetectionOutput` or `SegmentationOutput`, with gradients.
        card: names the classes.
        place: the pixel that the user asks about, if any.
    """
    raise TypeError(f"nothing is known of the output {type(output).__name__}")


@subject_of.register
def _class(logits: Tensor, card: ModelCard, _place: Place | None) -> Subject:
    """Choose the most probable class."""
    number = int(logits[0].argmax())
    score = float(logits[0].softmax(0)[number].detach())
    return Subject(label=card.classes[number], score=score, target=logits[0, number])


@subject_of.register
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


@subject_of.register
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
