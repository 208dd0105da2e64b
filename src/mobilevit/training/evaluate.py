"""How good a model is on labelled pictures, and the files that show it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilevit.data.datasets import ImageSet
from mobilevit.data.loaders import BatchLoader
from mobilevit.files import write_json
from mobilevit.preprocessing import Preprocessing, read_image
from mobilevit.progress import Progress
from mobilevit.tasks.classification import (
    ClassificationReport,
    classification_report,
    prediction_sheet,
    save_confusion_matrix,
    worst_mistakes,
)
from mobilevit.tasks.drawing import save_image

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A report, and what it was computed from."""

    report: ClassificationReport
    logits: Tensor
    """float32 (M, K), on the CPU, in the order of the data."""
    labels: Tensor
    """int64 (M,)."""
    indices: list[int]
    """Position of each row's picture in the data: unreadable ones are missing."""
    errors: list[str]
    """One line for each unreadable picture."""


def default_num_workers(device: torch.device) -> int:
    """Reading processes: one for every two cores where the CPU also computes, else up to eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 2 if device.type == "cpu" else cores)


def evaluation_loader(
    data: ImageSet, preprocessing: Preprocessing, *, batch_size: int, num_workers: int, device: torch.device
) -> BatchLoader:
    """Every picture once, in order, through the preprocessing that predictions use."""
    return BatchLoader(
        data,
        preprocessing.resize,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: BatchLoader,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    label: str = "evaluate",
) -> Evaluation:
    """Run a model over all pictures of a loader and report.

    Raises:
        ValueError: not a single picture could be read.
    """
    all_logits: list[Tensor] = []
    labels: list[Tensor] = []
    indices: list[int] = []
    errors: list[str] = []
    with Progress(label, loader.num_images) as progress:
        for batch in loader.epoch():
            errors += batch.errors
            if len(batch.labels):
                images = preprocessing.normalize(batch.images.to(device, non_blocking=True))
                with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                    all_logits.append(model(images).float())
                labels.append(batch.labels)
                indices += batch.indices
            progress.advance(len(batch.labels) + len(batch.errors))
    if not indices:
        raise ValueError(f"{loader.data.origin}: none of its {len(loader.data)} pictures can be read; {errors[0]}")
    logits, truth = torch.cat(all_logits).cpu(), torch.cat(labels)
    report = classification_report(logits, truth, loader.data.classes)
    return Evaluation(report=report, logits=logits, labels=truth, indices=indices, errors=errors)


def write_evaluation(evaluation: Evaluation, data: ImageSet, folder: Path, *, num_samples: int = 24) -> None:
    """Write `evaluation.json`, the confusion matrix, sample predictions and the worst mistakes into a folder."""
    unreadable = {"unreadable": evaluation.errors} if evaluation.errors else {}
    write_json(folder / "evaluation.json", evaluation.report.to_dict() | unreadable)
    save_confusion_matrix(evaluation.report, folder)
    step = max(1, len(evaluation.indices) // num_samples)
    _write_sheet(evaluation, data, list(range(0, len(evaluation.indices), step))[:num_samples], folder / "samples.png")
    mistakes = worst_mistakes(evaluation.logits, evaluation.labels)
    if mistakes:
        _write_sheet(evaluation, data, mistakes, folder / "worst_mistakes.png")
    else:
        (folder / "worst_mistakes.png").unlink(missing_ok=True)


def report_unreadable(errors: Collection[str], kind: str, total: int) -> None:
    """Say how many pictures were left out, and name the first ten."""
    if not errors:
        return
    log.warning("left out %d of %d %s pictures, which cannot be read:", len(errors), total, kind)
    for line in sorted(errors)[:10]:
        log.warning("  %s", line)
    if len(errors) > 10:
        log.warning("  and %d more", len(errors) - 10)


def _write_sheet(evaluation: Evaluation, data: ImageSet, rows: list[int], path: Path) -> None:
    images = [read_image(data.open(evaluation.indices[row]), data.names[evaluation.indices[row]]) for row in rows]
    sheet = prediction_sheet(images, evaluation.logits[rows], evaluation.labels[rows].tolist(), data.classes)
    save_image(sheet, path)
