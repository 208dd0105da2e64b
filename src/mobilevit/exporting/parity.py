"""Whether an artifact gives the answers of the model it was made of, on real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilevit.card import TaskName
from mobilevit.exporting.graph import ExportGraph
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.inputs import normalize
from mobilevit.progress import Progress
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import Outputs
from mobilevit.results.detection import Detections, decode_detections, find_objects
from mobilevit.runtime.artifact import Precision
from mobilevit.runtime.session import ArtifactSession

MAX_DIFFERENCE = 1e-4
"""Of float32 outputs: logits, probabilities, and boxes in 0..1."""

_LEAST_AGREEMENT: dict[Precision, float] = {
    "fp32": 0.995, "fp16": 0.995, "bf16": 0.995, "int8": 0.95, "palettized": 0.95
}  # fmt: skip
"""Share of images with the same class, of boxes found by both, or mean IoU of masks. That of int8 is a floor for what
is not broken; what int8 costs in accuracy is measured on labeled images."""


TORN = 0.05
"""Two classes whose probabilities are no further apart than this are equally good answers in 16 bits and less."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The artifact beside PyTorch in float32, on the same pixels."""

    images: int
    source: str
    """Where the images come from."""
    max_difference: float | None
    """Largest absolute difference of any output value; None where outputs are classes."""
    agreement: float
    """Classification: share of images with the same best class. Detection: share of the boxes of each that the other
    has too (same class, IoU above 0.9; 0.5 for int8). Segmentation: mean IoU of the label maps."""
    measure: str
    """What agreement counts, in words."""
    good: bool
    """Whether both are within what the precision allows."""
    reason: str = ""
    """Why it is not good."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def check(reference: ExportGraph, session: ArtifactSession, pixels: Tensor, source: str) -> Parity:
    """Run both on the same pixels and compare.

    Args:
        reference: the graph in PyTorch, in float32.
        session: the artifact.
        pixels: uint8 (n, 3, H, W).
        source: what to call them.
    """
    artifact = session.artifact
    task, precision = artifact.card.task, artifact.precision
    size = artifact.batch_size or 4
    difference, scores, finite, torn = 0.0, [], True, 0
    with Progress("compare", len(pixels)) as progress:
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            expected = _answers(reference, batch, artifact.card.preprocessing)
            found = session.run(batch.permute(0, 2, 3, 1).numpy())
            outputs = [torch.from_numpy(np.ascontiguousarray(array)) for array in found.values()]
            for ours, theirs in zip(expected, outputs, strict=False):  # without what NMS inside has selected
                if ours.is_floating_point():
                    finite &= bool(theirs.float().isfinite().all())
                    difference = max(difference, float((ours.double() - theirs.double()).abs().max()))
            each = RESULT_TYPES[task].split(found)
            scores += _agreements(task, expected, each, 0.5 if precision in ("int8", "palettized") else 0.9)
            if task == "classification" and precision != "fp32":
                torn += _count_torn(expected[0], outputs[0].float())
            progress.advance(len(batch))
    measure = {
        "classification": "images with the same class",
        "detection": "boxes found by both",
        "segmentation": "mean IoU of the masks",
    }[task]
    agreement = sum(scores) / len(scores)
    allowed = _LEAST_AGREEMENT[precision]
    reason = ""
    if not finite:
        reason = "its answers are not finite numbers"
    elif precision == "fp32" and difference > MAX_DIFFERENCE:
        reason = f"its answers differ by up to {difference:.1e}, where {MAX_DIFFERENCE:.0e} is allowed"
    # Of few images, one may stand on the edge between two classes, too.
    elif sum(1 - score for score in scores) - torn > max(
        1.0 if precision != "fp32" else 0.0, (1 - allowed) * len(scores)
    ):
        reason = f"{measure}: {agreement:.1%}, where {allowed:.1%} is needed"
    return Parity(
        images=len(pixels),
        source=source,
        max_difference=None if "label_map" in artifact.outputs else difference,
        agreement=agreement,
        measure=measure,
        good=not reason,
        reason=reason,
    )


def _answers(graph: ExportGraph, pixels: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = graph(pixels.permute(0, 2, 3, 1) if graph.baked else normalize(pixels, preprocessing))
    return outputs


def _agreements(
    task: TaskName, expected: tuple[Tensor, ...], found: list[Outputs], iou_threshold: float
) -> list[float]:
    """For each image, 0..1."""
    if task == "classification":
        return [float(int(a.argmax()) == int(b["logits"].argmax())) for a, b in zip(expected[0], found, strict=True)]
    if task == "segmentation":
        theirs = [torch.from_numpy(np.ascontiguousarray(next(iter(b.values())))) for b in found]
        return [_mean_iou(_labels(a), _labels(b)) for a, b in zip(expected[0], theirs, strict=True)]
    ours = [find_objects(boxes.numpy(), scores.numpy()) for boxes, scores in zip(*expected, strict=True)]
    return [_both_find(a, decode_detections(b), iou_threshold) for a, b in zip(ours, found, strict=True)]


def _count_torn(expected: Tensor, found: Tensor) -> int:
    """Images with another class than before, which PyTorch holds for nearly as probable as its own."""
    probabilities = expected.softmax(dim=1)
    theirs = probabilities.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    behind = probabilities.amax(dim=1) - theirs
    return int(((behind > 0) & (behind <= TORN)).sum())


def _labels(answer: Tensor) -> Tensor:
    return answer if answer.ndim == 2 else answer.argmax(0)


def _mean_iou(a: Tensor, b: Tensor) -> float:
    """Over the classes that either has."""
    ious = []
    for label in torch.cat([a.flatten(), b.flatten()]).bincount().nonzero():
        here, there = a == label, b == label
        ious.append(float((here & there).sum() / (here | there).sum()))
    return sum(ious) / len(ious)


def _both_find(a: Detections, b: Detections, iou_threshold: float) -> float:
    """Share of the boxes of each that have their like in the other, of those not near the end of the list."""
    from torchvision.ops import box_iou

    # The improbable come and go with rounding: count what is clearly there, or, if nothing is, the ten surest.
    least = min(0.1, float(a.scores[:10].min()) if len(a.scores) else 1.0)
    sure_a, sure_b = a.scores >= least, b.scores >= least
    if not sure_a.any() and not sure_b.any():
        return 1.0
    shares = []
    for first, others, sure in ((a, b, sure_a), (b, a, sure_b)):
        if sure.any():
            overlap = box_iou(torch.from_numpy(first.boxes_xyxy[sure]), torch.from_numpy(others.boxes_xyxy)).numpy()
            same = (overlap > iou_threshold) & (first.class_ids[sure][:, None] == others.class_ids[None])
            shares.append(float(same.any(axis=1).mean()) if same.size else 0.0)
    return sum(shares) / len(shares)
