"""Choosing the labeled images to measure on, and measuring."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilevit.card import ModelCard
    from mobilevit.data.imageset import ImageSet
    from mobilevit.evaluation import Evaluation
    from mobilevit.exporting.export import Evaluate
    from mobilevit.runtime.session import Session

log = logging.getLogger("mobilevit")


def evaluate_on(
    session: Session,
    data: ImageSet[Any],
    card: ModelCard,
    batch_size: int,
    num_workers: int | None = None,
    label: str = "evaluate",
) -> Evaluation:
    """What a model makes of labeled images; as many processes read as suit this machine, if no number is given."""
    import torch

    from mobilevit.evaluation import default_num_workers, evaluate, evaluation_loader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # only decides how images are read
    workers = default_num_workers(device) if num_workers is None else num_workers
    loader = evaluation_loader(data, card.preprocessing, batch_size=batch_size, num_workers=workers, device=device)
    return evaluate(session, loader, label=label)


def data_to_evaluate(path: str, split: str, card: ModelCard) -> tuple[ImageSet[Any], str]:
    """The images to measure on, by the classes of the model, and in words which they are.

    Raises:
        ValueError: no such part, or classes that the model does not know.
    """
    from mobilevit.data.datasets import part_to_evaluate

    data, which = part_to_evaluate(path, split, task=card.task, provenance=card.provenance)
    return data.relabel(card.classes), which


def measure_on(path: str, card: ModelCard) -> Evaluate:
    """A function that measures any session of a model on labeled images."""
    data, which = data_to_evaluate(path, "auto", card)
    log.info("accuracy is measured on %s: %s, %d images", path, which, len(data))

    def measure(session: Session, card: ModelCard, label: str) -> dict[str, float]:
        return dict(evaluate_on(session, data, card, 16, label=f"evaluate {label}").report.summary)

    return measure
