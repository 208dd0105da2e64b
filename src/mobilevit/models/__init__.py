"""The architectures, by name."""

from __future__ import annotations

from difflib import get_close_matches

from mobilevit.models.mobilevit import XS, XXS, MobileViTConfig, S

MODELS: dict[str, MobileViTConfig] = {
    "mobilevit_s": S,
    "mobilevit_xs": XS,
    "mobilevit_xxs": XXS,
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return sorted(MODELS)


def model_config(name: str) -> MobileViTConfig:
    """The configuration of a named model.

    Raises:
        ValueError: no such model; the nearest name is suggested.
    """
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown model {name!r}; {hint} There are {', '.join(list_models())}".replace("  ", " "))
    return MODELS[name]
