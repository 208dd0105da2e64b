"""The model card: all that a user would otherwise have to remember about a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing

TaskName = Literal["classification", "detection", "segmentation"]
"""Predict the class of an image, boxes around objects, or the class of every pixel."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Travels with a model through `save`, `load`, `fuse` and export."""

    name: str
    """Architecture, a key of `MODELS`."""
    task: TaskName
    """The task of the model."""
    classes: tuple[str, ...]
    """Labels, by output index; a detector's without the background, which is output 0."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """How images become input."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Measured when the model was saved."""
    score_threshold: float | None = None
    """Detection: the lowest score that is shown; where precision and recall balanced best."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Origin of the weights: data, starting weights, license, versions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        """Read what `to_dict` wrote, now or in version 0.1; other keys are ignored."""
        provenance = dict(values["provenance"])
        if "licence" in provenance:  # the spelling of version 0.1
            provenance["license"] = provenance.pop("licence")
        return cls(
            name=values["name"],
            task=values["task"],
            classes=tuple(values["classes"]),
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            metrics=dict(values["metrics"]),
            score_threshold=values.get("score_threshold"),  # the first checkpoints had none
            provenance=provenance,
        )


def card_of(model: object) -> ModelCard:
    """Get the card of a model made by `create_model` or `load`.

    Raises:
        MobileViTError: the model has none.
    """
    card = getattr(model, "card", None)
    if not isinstance(card, ModelCard):
        raise MobileViTError("the model has no card; make it with mobilevit.create_model or mobilevit.load")
    return card


def default_classes(num_classes: int) -> tuple[str, ...]:
    """Make placeholder labels for a model without class names."""
    return tuple(f"class_{index}" for index in range(num_classes))
