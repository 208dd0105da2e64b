"""The callback through which exporting measures sessions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilevit.card import ModelCard
    from mobilevit.exporting.export import Evaluate
    from mobilevit.runtime.session import Session

log = logging.getLogger("mobilevit")


def measure_on(path: str, card: ModelCard) -> Evaluate:
    """Make a function that measures any session of a model on labeled images."""
    from mobilevit.evaluation import evaluate_session, find_part

    data, which = find_part(path, "auto", card)
    log.info("accuracy is measured on %s: %s, %d images", path, which, len(data))

    def measure(session: Session, _: ModelCard, label: str) -> dict[str, float]:
        return evaluate_session(session, data, label=f"evaluate {label}").report.summary

    return measure
