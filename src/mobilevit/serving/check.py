"""Whether files can be served, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from mobilevit import factory
from mobilevit.inference.artefact import is_artefact, read_sidecar
from mobilevit.serving.settings import ServedModel


def check_models(models: Sequence[ServedModel]) -> None:
    """Read every file once.

    Raises:
        ValueError: one is damaged, or no model of this package.
    """
    for model in models:
        if is_artefact(model.path):
            read_sidecar(model.path)
        else:
            factory.load(model.path)
