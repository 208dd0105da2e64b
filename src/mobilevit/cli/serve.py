"""`mobilevit serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from tyro.conf import Positional, arg

from mobilevit.errors import MissingPackageError
from mobilevit.runtime.artifact import is_artifact
from mobilevit.serving.settings import ServeConfig, name_models

_PACKAGES = ("uvicorn", "fastapi", "prometheus_client", "python_multipart")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve one or more models over HTTP: predictions in batches, a web page, metrics."""

    checkpoints: Positional[tuple[str, ...]]
    """Checkpoints or exported files, each FILE or NAME=FILE; the first is used for requests that name no model."""
    settings: Annotated[ServeConfig, arg(name="")]

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT."""
        models = name_models(self.checkpoints)
        for package in _PACKAGES:
            if find_spec(package) is None:
                raise MissingPackageError(f"{package} is not installed; pip install 'mobilevit[serve]'")
        from mobilevit.serving.server import serve

        if not all(is_artifact(path) for path in models.values()):
            # PyTorch's threads would spin while they wait, on the cores of the threads that read images.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return serve(self.settings, models, lambda address: print(f"serving at {address}", flush=True))
