"""Evaluate models on labeled images, and write the files that show the result."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mobilevit.card import ModelCard
from mobilevit.data.datasets import part_to_evaluate
from mobilevit.data.imageset import AnyImages, ImageSet, report_problems
from mobilevit.data.loaders import BatchLoader, default_num_workers
from mobilevit.errors import MobileViTError
from mobilevit.files import write_json
from mobilevit.imaging.decode import EncodedImage, read_image
from mobilevit.imaging.drawing import save_image
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.progress import Progress
from mobilevit.runtime.session import EngineChoice, Session, open_session
from mobilevit.tasks.report import Meter, Report, Truth
from mobilevit.tasks.task import Target, Task

log = logging.getLogger("mobilevit")

NUM_SAMPLES = 24
"""Images on the sheets of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The report, and what it was computed from."""

    report: Report
    meter: Meter[Any]
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


def find_part(path: str | os.PathLike[str], split: str, card: ModelCard) -> tuple[AnyImages, str]:
    """Read the images to measure a model on, labeled in the order of its classes, and say in words which they are.

    Raises:
        MobileViTError: no such part, or classes that the model does not know.
    """
    data, which = part_to_evaluate(path, split, task=card.task, provenance=card.provenance)
    return data.relabel(card.classes), which


def evaluate_session(
    session: Session,
    data: AnyImages,
    *,
    batch_size: int = 16,
    num_workers: int | None = None,
    label: str = "evaluate",
) -> Evaluation:
    """Run a model, in whatever engine, over images labeled in the order of its classes; see `find_part`.

    Raises:
        MobileViTError: a wrong setting, or not a single image can be read.
    """
    if batch_size < 1:
        raise MobileViTError(f"`batch_size` is {batch_size}; it must be 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # only decides how images are read
    workers = default_num_workers(device) if num_workers is None else num_workers
    loader = evaluation_loader(data, session.card, batch_size=batch_size, num_workers=workers, device=device)
    return measure(session, loader, label=label)


def evaluation_loader(
    data: ImageSet[Target], card: ModelCard, *, batch_size: int, num_workers: int, device: torch.device
) -> BatchLoader:
    """Load every image once, in order, preprocessed as for predictions; of several processes, each loads a share."""
    result_type = data.task.result_type
    result_type.check(card.preprocessing)
    return BatchLoader(
        data,
        partial(_prepare, data.task, card.preprocessing),
        collate=list,
        batch_size=min(batch_size, result_type.max_batch_size(card)),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        shard=(distributed.get_rank(), distributed.get_world_size()) if _is_distributed() else (0, 1),
    )


def _prepare(
    task: Task[Target, Truth], preprocessing: Preprocessing, image: EncodedImage, target: Target
) -> tuple[Tensor, tuple[tuple[int, int], Truth]]:
    """Resize an image, and read its (height, width) and truth."""
    pixels = torch.from_numpy(preprocessing.resize(image.decode())).permute(2, 0, 1)
    size = image.size[1], image.size[0]
    return pixels, (size, task.read_truth(target, size))


def measure(session: Session, loader: BatchLoader, *, label: str = "evaluate") -> Evaluation:
    """Run a model over all images of an `evaluation_loader`; several processes each get the report on all images.

    Raises:
        MobileViTError: not a single image can be read.
    """
    data, preprocessing = loader.data, session.card.preprocessing
    meter, errors = data.task.new_meter(data.classes), list[str]()
    with Progress(label, loader.num_images) as progress:
        for batch in loader.epoch():
            errors += batch.errors
            if len(batch):
                outputs = data.task.result_type.split(session.run(batch.images.permute(0, 2, 3, 1).numpy()))
                for index, (size, truth), output in zip(batch.indices, batch.targets, outputs, strict=True):
                    meter.add(index, output, truth, preprocessing.placement(size))
            progress.advance(len(batch) + len(batch.errors))
    if _is_distributed():
        shares = [(meter, errors)] * distributed.get_world_size()
        distributed.all_gather_object(shares, (meter, errors))
        meter, errors = data.task.new_meter(data.classes), []
        for other, other_errors in shares:
            meter.merge(other)
            errors += other_errors
    if not meter.indices:
        raise MobileViTError(f"{data.origin}: none of its {len(data)} images can be read; {errors[0]}")
    return Evaluation(report=meter.report(), meter=meter, errors=errors)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def write_evaluation(evaluation: Evaluation, data: AnyImages, folder: Path) -> None:
    """Write `evaluation.json`, plots, sample predictions and the worst mistakes into a folder."""
    unreadable = {"unreadable": evaluation.errors} if evaluation.errors else {}
    write_json(folder / "evaluation.json", evaluation.report.to_dict() | unreadable)
    evaluation.report.save_plots(folder)
    indices = list(evaluation.meter.indices)
    evenly_spaced = indices[:: max(1, len(indices) // NUM_SAMPLES)][:NUM_SAMPLES]
    _draw(evaluation.meter, data, evenly_spaced, folder / "samples.png")
    mistakes = evaluation.meter.worst(NUM_SAMPLES)
    if mistakes:
        _draw(evaluation.meter, data, mistakes, folder / "worst_mistakes.png")
    else:
        (folder / "worst_mistakes.png").unlink(missing_ok=True)


def report_unreadable(errors: Collection[str], kind: str, total: int) -> None:
    """Log how many images were left out, and the first ten."""
    if not errors:
        return
    log.warning("left out %d of %d %s images, which cannot be read:", len(errors), total, kind)
    for line in sorted(errors)[:10]:
        log.warning("  %s", line)
    if len(errors) > 10:
        log.warning("  and %d more", len(errors) - 10)


def _draw(meter: Meter[Truth], data: ImageSet[Target], indices: Sequence[int], path: Path) -> None:
    images = [read_image(data.open(index), data.names[index]) for index in indices]
    sizes = [(image.height, image.width) for image in images]
    truths = [data.task.read_truth(data.targets[index], size) for index, size in zip(indices, sizes, strict=True)]
    save_image(meter.draw(indices, images, truths), path)
