from __future__ import annotations

import json

from mobilevit.card import ModelCard
from mobilevit.imaging.preprocessing import Preprocessing

CARD = ModelCard(
    name="mobilevit_s",
    task="detection",
    classes=("cat", "猫"),
    preprocessing=Preprocessing(size=(96, 128), mean=(0.5, 0.4, 0.3)),
    metrics={"ap": 0.5},
    score_threshold=0.25,
    provenance={"license": "MIT"},
)


def test_a_card_survives_json() -> None:
    assert ModelCard.from_dict(json.loads(json.dumps(CARD.to_dict()))) == CARD


def test_cards_of_version_0_1() -> None:
    values = CARD.to_dict() | {"provenance": {"licence": "MIT", "data": "pets"}, "format_version": 1}
    del values["score_threshold"]
    card = ModelCard.from_dict(values)
    assert card.provenance == {"data": "pets", "license": "MIT"}
    assert card.score_threshold is None
