"""What commands with `--data` share: which labeled images to measure on, and the measuring."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from mobilevit.errors import MobileViTError

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
    data, which = _choose(path, split, card)
    return data.relabel(card.classes), which


def _choose(path: str, split: str, card: ModelCard) -> tuple[ImageSet[Any], str]:
    from mobilevit.data.datasets import find_splits
    from mobilevit.data.imageset import split as divide

    sets = find_splits(path, card.task)
    everything = sets.get("all")
    if everything is None:
        kind = split
        if split == "auto":
            kind = next(name for name in ("val", "test", "train") if name in sets)
        if kind not in sets:
            raise MobileViTError(f"{path}: is divided into {' and '.join(sets)}; choose --split {' or '.join(sets)}")
        return sets[kind], f"the {kind} part"
    if split == "test":
        raise MobileViTError(f"{path}: has no test part; leave --split out, or choose --split all")
    if split == "all":
        return everything, "all of it"
    told = card.provenance
    if "data_fingerprint" in told:
        with contextlib.suppress(ValueError):  # data that cannot be divided are not what it was trained on
            train, val = divide(everything, val_fraction=float(told["val_fraction"]), seed=int(told["seed"]))
            if train.fingerprint() == told["data_fingerprint"]:
                if split == "train":
                    return train, "what it was trained on"
                return val, "what was held out when it was trained on these"
    if split != "auto":
        raise MobileViTError(f"{path}: not divided, and not what this checkpoint was trained on; use --split all")
    return everything, "all of it"


def measure_on(path: str, card: ModelCard) -> Evaluate:
    """A function that measures any session of a model on labeled images."""
    data, which = data_to_evaluate(path, "auto", card)
    log.info("accuracy is measured on %s: %s, %d images", path, which, len(data))

    def measure(session: Session, card: ModelCard, label: str) -> dict[str, float]:
        return dict(evaluate_on(session, data, card, 16, label=f"evaluate {label}").report.summary)

    return measure
