"""Settings of training by their flat names, as on the command line."""

from __future__ import annotations

import dataclasses

from mobilevit.training.config import TrainConfig


def with_settings(config: TrainConfig, **settings: object) -> TrainConfig:
    """The configuration with some settings changed, in whichever group they are."""
    groups = {}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if dataclasses.is_dataclass(group):
            inner = {name: settings.pop(name) for name in list(settings) if hasattr(group, name)}
            groups[field.name] = dataclasses.replace(group, **inner)
    return dataclasses.replace(config, **groups, **settings)
