"""The architectures by name."""

from __future__ import annotations

from mobilevit.errors import MobileViTError, did_you_mean
from mobilevit.models.heads import HeadConfig, Model, build_model
from mobilevit.models.mobilevit import XS, XXS, MobileViTConfig, S

__all__ = ["MODELS", "HeadConfig", "Model", "build_model", "list_models", "model_config"]

MODELS: dict[str, MobileViTConfig] = {
    "mobilevit_s": S,
    "mobilevit_xs": XS,
    "mobilevit_xxs": XXS,
}


def list_models() -> list[str]:
    """Return the names that `create_model` takes."""
    return sorted(MODELS)


def model_config(name: str) -> MobileViTConfig:
    """Look up the shape of a named model.

    Raises:
        MobileViTError: no such model; the nearest name is suggested.
    """
    if name not in MODELS:
        raise MobileViTError(
            f"unknown model {name!r}; {did_you_mean(name, MODELS)}There are {', '.join(list_models())}"
        )
    return MODELS[name]
