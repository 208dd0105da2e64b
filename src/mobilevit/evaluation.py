"""Evaluate models on labeled images, and write the files that show the result."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed, nn

from mobilevit.card import ModelCard, TaskName
from mobilevit.data.datasets import part_to_evaluate
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import Batch, BatchLoader, Transform
from mobilevit.data.transforms import read_mask
from mobilevit.errors import MobileViTError
from mobilevit.files import write_json
from mobilevit.imaging.decode import EncodedImage, read_image
from mobilevit.imaging.drawing import save_image
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import available_cores
from mobilevit.progress import Progress
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import Outputs
from mobilevit.results.detection import decode_detections, to_pixels
from mobilevit.results.segmentation import decode_label_map
from mobilevit.runtime.session import EngineChoice, Session, open_session
from mobilevit.tasks.classification_report import ClassificationMeter
from mobilevit.tasks.classification_report import prediction_sheet as classification_sheet
from mobilevit.tasks.detection_report import DetectionMeter, detection_sheet
from mobilevit.tasks.report import Meter, Report
from mobilevit.tasks.segmentation import most_at_once
from mobilevit.tasks.segmentation_report import SegmentationMeter, segmentation_sheet

log = logging.getLogger("mobilevit")

NUM_SAMPLES = 24
"""Images on the sheets of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The report, and what it was computed from."""

    report: Report
    meter: Meter
    errors: list[str]
    """One line for each unreadable image."""


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    data: str | os.PathLike[str],
    *,
    split: str = "auto",
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    engine: EngineChoice = "torch",
    num_workers: int | None = None,
) -> Report:
    """Measure a model on labeled images: accuracy, AP or mean IoU, per class.

    Args:
        model: a checkpoint, an exported file, or a model from `create_model` or `load`.
        data: labeled images, as for training.
        split: "auto": the val part if there is one; of the data the model was trained on, what was held out; of other
            data, all. Or "train", "val", "test", "all".
        batch_size: images that go through the model together.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        threads: to compute with on the CPU; by default, as many as there are cores.
        engine: what runs a checkpoint; see `Predictor`.
        num_workers: processes that read images; by default, by the number of cores.

    Raises:
        MobileViTError: model or data cannot be read, there is no such part, or the data have classes that the model
            does not know.
    """
    session = open_session(model, device=device, threads=threads, engine=engine)
    images, which = find_part(data, split, session.card)
    log.info("%s on %s: %s, %d images", session.card.name, data, which, len(images))
    report_problems(images)
    evaluation = evaluate_session(session, images, batch_size=batch_size, num_workers=num_workers)
    report_unreadable(evaluation.errors, "labeled", len(images))
    return evaluation.report


def find_part(path: str | os.PathLike[str], split: str, card: ModelCard) -> tuple[ImageSet[Any], str]:
    """Read the images to measure a model on, labeled in the order of its classes, and say in words which they are.

    Args:
        path: labeled images, as for training.
        split: see `evaluate`.
        card: of the model.

    Raises:
        MobileViTError: no such part, or classes that the model does not know.
    """
    data, which = part_to_evaluate(path, split, task=card.task, provenance=card.provenance)
    return data.relabel(card.classes), which


def evaluate_session(
    session: Session,
    data: ImageSet[Any],
    *,
    batch_size: int = 16,
    num_workers: int | None = None,
    label: str = "evaluate",
) -> Evaluation:
    """Run a model, in whatever engine, over labeled images.

    Args:
        session: the model.
        data: the images, labeled in the order of its classes; see `find_part`.
        batch_size: images that go through the model together.
        num_workers: processes that read images; by default, by the number of cores.
        label: of the progress bar.

    Raises:
        MobileViTError: a wrong setting, or not a single image can be read.
    """
    if batch_size < 1:
        raise MobileViTError(f"`batch_size` is {batch_size}; it must be 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # only decides how images are read
    workers = default_num_workers(device) if num_workers is None else num_workers
    loader = evaluation_loader(
        data, session.card.preprocessing, batch_size=batch_size, num_workers=workers, device=device
    )
    return measure(session, loader, label=label)


def default_num_workers(device: torch.device, *, sharing: int = 1) -> int:
    """Choose how many processes read: one for every two cores where the CPU also computes, else up to eight.

    Args:
        device: computes meanwhile.
        sharing: processes that share the cores; each has that many readers.
    """
    cores = available_cores() // sharing
    return min(8, cores // 2 if device.type == "cpu" else cores)


def evaluation_loader(
    data: ImageSet[Any],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> BatchLoader:
    """Load every image once, in order, preprocessed as for predictions; of several processes, each loads a share.

    Raises:
        MobileViTError: the preprocessing crops, where every pixel has to be classified.
    """
    RESULT_TYPES[data.task].check(preprocessing)
    if data.task == "segmentation":
        batch_size = min(batch_size, most_at_once(len(data.classes), preprocessing.size))
    transforms: dict[TaskName, Transform] = {
        "classification": partial(_with_label, preprocessing),
        "detection": partial(_with_size, preprocessing),
        "segmentation": partial(_with_mask, preprocessing),
    }
    return BatchLoader(
        data,
        transforms[data.task],
        collate=torch.tensor if data.task == "classification" else list,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        shard=(distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1),
    )


def _with_label(preprocessing: Preprocessing, image: EncodedImage, label: int) -> tuple[Tensor, int]:
    return _resized(preprocessing, image.decode()), label


def _with_size(preprocessing: Preprocessing, image: EncodedImage, _: object) -> tuple[Tensor, tuple[int, int]]:
    width, height = image.size
    return _resized(preprocessing, image.decode()), (height, width)


def _with_mask(preprocessing: Preprocessing, encoded: EncodedImage, target: Any) -> tuple[Tensor, np.ndarray]:
    image = encoded.decode()
    return _resized(preprocessing, image), read_mask(image, target)


def _resized(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    return torch.from_numpy(preprocessing.resize(image)).permute(2, 0, 1)


def _observe_classes(meter: Any, outputs: list[Outputs], batch: Batch, _data: ImageSet[Any], _: Preprocessing) -> None:
    logits = torch.from_numpy(np.stack([each["logits"] for each in outputs]))
    meter.update(batch.indices, logits.float(), batch.targets)


def _observe_boxes(
    meter: Any, outputs: list[Outputs], batch: Batch, data: ImageSet[Any], preprocessing: Preprocessing
) -> None:
    for index, size, each in zip(batch.indices, batch.targets, outputs, strict=True):
        boxes, scores, class_ids = to_pixels(decode_detections(each), preprocessing.placement(size))
        truth = data.targets[index]
        meter.update(
            index,
            boxes_xyxy=boxes,
            scores=scores,
            labels=class_ids,
            true_xyxy=truth.xyxy,
            true_labels=truth.labels,
            true_crowd=truth.crowd,
            true_areas=truth.areas,
        )


def _observe_masks(
    meter: Any, outputs: list[Outputs], batch: Batch, _: ImageSet[Any], preprocessing: Preprocessing
) -> None:
    for index, each, truth in zip(batch.indices, outputs, batch.targets, strict=True):
        meter.update(index, decode_label_map(each, preprocessing.placement(truth.shape)), truth)


_OBSERVE: dict[TaskName, Callable[[Any, list[Outputs], Batch, ImageSet[Any], Preprocessing], None]] = {
    "classification": _observe_classes,
    "detection": _observe_boxes,
    "segmentation": _observe_masks,
}


def _new_meter(data: ImageSet[Any]) -> Meter:
    if data.task == "classification":
        return ClassificationMeter(data.classes)
    if data.task == "detection":
        return DetectionMeter(data.classes)
    return SegmentationMeter(data.classes, keep=_evenly_spaced(range(len(data))))


def measure(session: Session, loader: BatchLoader, *, label: str = "evaluate") -> Evaluation:
    """Run a model over all images of a loader; several processes each get the report on all images.

    Args:
        session: the model.
        loader: the images, through the preprocessing of the session's card; see `evaluation_loader`.
        label: of the progress bar.

    Raises:
        MobileViTError: not a single image can be read.
    """
    data, preprocessing = loader.data, session.card.preprocessing
    meter, observe, errors = _new_meter(data), _OBSERVE[data.task], []
    with Progress(label, loader.num_images) as progress:
        for batch in loader.epoch():
            errors += batch.errors
            if len(batch):
                outputs = session.run(batch.images.permute(0, 2, 3, 1).numpy())
                observe(meter, RESULT_TYPES[data.task].split(outputs), batch, data, preprocessing)
            progress.advance(len(batch) + len(batch.errors))
    if _is_distributed():
        shares: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, (meter, errors))
        meter, errors = _new_meter(data), []
        for other, other_errors in shares:
            meter.merge(other)
            errors += other_errors
    if not meter.indices:
        raise MobileViTError(f"{data.origin}: none of its {len(data)} images can be read; {errors[0]}")
    return Evaluation(report=meter.report(), meter=meter, errors=errors)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def write_evaluation(evaluation: Evaluation, data: ImageSet[Any], folder: Path) -> None:
    """Write `evaluation.json`, plots, sample predictions and the worst mistakes into a folder."""
    unreadable = {"unreadable": evaluation.errors} if evaluation.errors else {}
    write_json(folder / "evaluation.json", evaluation.report.to_dict() | unreadable)
    evaluation.report.save_plots(folder)
    _write_sheet(evaluation.meter, data, _evenly_spaced(evaluation.meter.indices), folder / "samples.png")
    mistakes = evaluation.meter.worst(NUM_SAMPLES)
    if mistakes:
        _write_sheet(evaluation.meter, data, mistakes, folder / "worst_mistakes.png")
    else:
        (folder / "worst_mistakes.png").unlink(missing_ok=True)


def _evenly_spaced(indices: Sequence[int]) -> list[int]:
    step = max(1, len(indices) // NUM_SAMPLES)
    return list(indices[::step])[:NUM_SAMPLES]


def report_problems(data: ImageSet[Any]) -> None:
    """Log how many problems the annotations have, and the first five."""
    if not data.problems:
        return
    log.warning(
        "%s: %d problems in the annotations (all of them: mobilevit data check):", data.origin, len(data.problems)
    )
    for problem in data.problems[:5]:
        log.warning("  %s", problem)


def report_unreadable(errors: Collection[str], kind: str, total: int) -> None:
    """Log how many images were left out, and the first ten."""
    if not errors:
        return
    log.warning("left out %d of %d %s images, which cannot be read:", len(errors), total, kind)
    for line in sorted(errors)[:10]:
        log.warning("  %s", line)
    if len(errors) > 10:
        log.warning("  and %d more", len(errors) - 10)


def _write_sheet(meter: Meter, data: ImageSet[Any], indices: Sequence[int], path: Path) -> None:
    images = [read_image(data.open(index), data.names[index]) for index in indices]
    if isinstance(meter, ClassificationMeter):
        rows = [meter.indices.index(index) for index in indices]
        sheet = classification_sheet(images, meter.logits[rows], meter.labels[rows].tolist(), data.classes)
    elif isinstance(meter, DetectionMeter):
        seen = [meter.images[index] for index in indices]
        sheet = detection_sheet(images, seen, data.classes, meter.best_threshold())
    else:
        assert isinstance(meter, SegmentationMeter)
        shown = [place for place, index in enumerate(indices) if index in meter.label_maps]
        sheet = segmentation_sheet(
            [images[place] for place in shown],
            [meter.label_maps[indices[place]] for place in shown],
            [data.targets[indices[place]].read() for place in shown],
            data.classes,
        )
    save_image(sheet, path)
