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
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.progress import Progress
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import Outputs
from mobilevit.results.detection import Detections, decode_detections
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
            expected, found = _reference_outputs(reference, batch, card.preprocessing), session.run(batch)
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


def _reference_outputs(graph: ExportGraph, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Outputs:
    """Run the graph in PyTorch."""
    inputs = torch.from_numpy(pixels if graph.baked else preprocessing.normalize(pixels))
    return {name: tensor.numpy() for name, tensor in zip(graph.output_names, graph(inputs), strict=True)}


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
    ious = []
    for label in np.union1d(ours, theirs):
        here, there = ours == label, theirs == label
        ious.append((here & there).sum() / (here | there).sum())
    return float(np.mean(ious)), float(1 - np.mean(ious))


def _shared_boxes(expected: Outputs, found: Outputs, precision: Precision) -> tuple[float, float]:
    """Count the boxes of each that the other has, too, except for those near the end of the list."""
    a, b = decode_detections(expected), decode_detections(found)
    # Improbable boxes come and go with rounding: count those that are clearly there, or, if none is, the ten best.
    least = min(0.1, float(a.scores[:10].min()) if len(a.scores) else 1.0)
    min_overlap = 0.5 if precision in _COARSE else 0.9
    shares = [
        _share_found(first, others, first.scores >= least, min_overlap)
        for first, others in ((a, b), (b, a))
        if (first.scores >= least).any()
    ]
    share = sum(shares) / len(shares) if shares else 1.0
    return share, 1 - share


def _share_found(boxes: Detections, others: Detections, chosen: NDArray[np.bool_], min_overlap: float) -> float:
    """Return the share of the chosen boxes that have their like among others."""
    overlap = box_iou(torch.from_numpy(boxes.boxes_xyxy[chosen]), torch.from_numpy(others.boxes_xyxy)).numpy()
    same = (overlap > min_overlap) & (boxes.class_ids[chosen][:, None] == others.class_ids[None])
    return float(same.any(axis=1).mean())


_COMPARISONS: dict[TaskName, tuple[str, Callable[[Outputs, Outputs, Precision], tuple[float, float]]]] = {
    "classification": ("images with the same class", _same_class),
    "detection": ("boxes found by both", _shared_boxes),
    "segmentation": ("mean IoU of the masks", _mask_iou),
}
"""By task: the measure in words, and the comparison of the outputs for one image. It returns the agreement in 0..1 and
the loss that counts against the artifact."""
