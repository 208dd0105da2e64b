"""Compare an artifact with the model it was made of, on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from mobilevit.card import TaskName
from mobilevit.exporting.graph import ExportGraph
from mobilevit.progress import Progress
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import Outputs
from mobilevit.results.detection import decode_detections
from mobilevit.runtime.artifact import Precision
from mobilevit.runtime.session import ArtifactSession

_MAX_DIFFERENCE = 1e-4
"""Between float32 outputs: logits, probabilities, and boxes in 0..1."""

_COARSE: tuple[Precision, ...] = ("int8", "palettized")
"""Their agreement only tells whether the file is broken; what they cost in accuracy is measured on labeled images."""

_TORN = 0.05
"""Two classes whose probabilities are no further apart than this are equally good answers in 16 bits and less."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The artifact beside PyTorch in float32, on the same pixels."""

    images: int
    source: str
    """Origin of the images, in words."""
    max_difference: float | None
    """Largest absolute difference of any output value; None where outputs are classes."""
    agreement: float
    """Classification: share of images with the same best class. Detection: share of the boxes of each that the other
    has too (same class, IoU above 0.9; 0.5 for int8). Segmentation: mean IoU of the label maps."""
    measure: str
    """The agreement in words."""
    good: bool
    """Whether both are within what the precision allows."""
    reason: str = ""
    """Why it is not good."""


@torch.inference_mode()
def check(reference: ExportGraph, session: ArtifactSession, pixels: NDArray[np.uint8], source: str) -> Parity:
    """Run the graph in PyTorch and the artifact on the same pixels, (n, H, W, 3), and compare."""
    artifact = session.artifact
    card, precision = artifact.card, artifact.precision
    measure, compare = _COMPARISONS[card.task]
    split = RESULT_TYPES[card.task].split
    size = artifact.batch_size or 4
    difference, finite, agreements, losses = 0.0, True, [], []
    with Progress("compare", len(pixels)) as progress:
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            inputs = torch.from_numpy(batch if reference.baked else card.preprocessing.normalize(batch))
            answers = zip(reference.output_names, reference(inputs), strict=True)
            expected, found = {name: tensor.numpy() for name, tensor in answers}, session.run(batch)
            for name, ours in expected.items():
                if np.issubdtype(ours.dtype, np.floating):
                    theirs = found[name]
                    finite &= bool(np.isfinite(theirs).all())
                    difference = max(difference, float(np.abs(ours.astype(np.float64) - theirs).max()))
            for one, other in zip(split(expected), split(found), strict=True):
                agreement, loss = compare(one, other, precision)
                agreements.append(agreement)
                losses.append(loss)
            progress.advance(len(batch))
    needed = 0.95 if precision in _COARSE else 0.995
    reason = ""
    if not finite:
        reason = "its answers are not finite numbers"
    elif precision == "fp32" and difference > _MAX_DIFFERENCE:
        reason = f"its answers differ by up to {difference:.1e}, where {_MAX_DIFFERENCE:.0e} is allowed"
    # Even among few images, one may lie on the edge between two classes.
    elif sum(losses) > max(0.0 if precision == "fp32" else 1.0, (1 - needed) * len(losses)):
        reason = f"{measure}: {np.mean(agreements):.1%}, where {needed:.1%} is needed"
    return Parity(
        images=len(pixels),
        source=source,
        max_difference=None if "label_map" in artifact.outputs else difference,
        agreement=float(np.mean(agreements)),
        measure=measure,
        good=not reason,
        reason=reason,
    )


def _same_class(expected: Outputs, found: Outputs, precision: Precision) -> tuple[float, float]:
    """Compare the best classes; another class that PyTorch holds for nearly as probable is no loss."""
    logits = torch.from_numpy(expected["logits"])
    ours, theirs = int(logits.argmax()), int(found["logits"].argmax())
    probabilities = logits.softmax(dim=0)
    torn = precision != "fp32" and bool(probabilities[ours] - probabilities[theirs] <= _TORN)
    return float(ours == theirs), float(ours != theirs and not torn)


def _mask_iou(expected: Outputs, found: Outputs, _: Precision) -> tuple[float, float]:
    """Compare label maps: mean IoU over the classes that either has."""
    ours, theirs = (
        outputs["label_map"] if "label_map" in outputs else outputs["logits"].argmax(0) for outputs in (expected, found)
    )
    masks = [(ours == label, theirs == label) for label in np.union1d(ours, theirs)]
    iou = float(np.mean([(here & there).sum() / (here | there).sum() for here, there in masks]))
    return iou, 1 - iou


def _shared_boxes(expected: Outputs, found: Outputs, precision: Precision) -> tuple[float, float]:
    """Count the boxes of each that the other has, too, except for those near the end of the list."""
    a, b = decode_detections(expected), decode_detections(found)
    # Improbable boxes come and go with rounding: count those that are clearly there, or, if none is, the ten best.
    least = min(0.1, float(a.scores[:10].min()) if len(a.scores) else 1.0)
    overlap = box_iou(torch.from_numpy(a.boxes_xyxy), torch.from_numpy(b.boxes_xyxy)).numpy()
    same = (overlap > (0.5 if precision in _COARSE else 0.9)) & (a.class_ids[:, None] == b.class_ids)
    found_in_other = (same.any(axis=1)[a.scores >= least], same.any(axis=0)[b.scores >= least])
    shares = [float(has_like.mean()) for has_like in found_in_other if len(has_like)]
    share = sum(shares) / len(shares) if shares else 1.0
    return share, 1 - share


_COMPARISONS: dict[TaskName, tuple[str, Callable[[Outputs, Outputs, Precision], tuple[float, float]]]] = {
    "classification": ("images with the same class", _same_class),
    "detection": ("boxes found by both", _shared_boxes),
    "segmentation": ("mean IoU of the masks", _mask_iou),
}
"""By task: the measure in words, and the comparison of the outputs for one image. It returns the agreement in 0..1 and
the loss that counts against the artifact."""
