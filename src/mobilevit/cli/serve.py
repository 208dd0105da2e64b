"""`mobilevit serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mobilevit.errors import MobileViTError
from mobilevit.serving.settings import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer over HTTP: predictions in batches, a web page, metrics; for one or more models."""

    checkpoints: Positional[tuple[str, ...]]
    """Checkpoints or exported files, each FILE or NAME=FILE; a request that names no model gets the first."""
    settings: Annotated[ServeConfig, arg(name="")]

    def run(self) -> int:
        """Serve until told to stop."""
        from mobilevit.serving.settings import name_models
        from mobilevit.webpage import page_files

        models = name_models(self.checkpoints)
        # Threads that wait for each other while they spin take the cores from those that read images.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            from mobilevit.serving.server import serve
        except ImportError as error:
            raise MobileViTError(f"{error.name} is not installed; pip install 'mobilevit[serve]'") from None
        pages = page_files("server")
        return serve(self.settings, models, pages, lambda address: print(f"serving at {address}", flush=True))
