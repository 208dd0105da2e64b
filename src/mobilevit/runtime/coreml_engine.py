"""The engine of Core ML."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run, import_runtime


class CoremlEngine(Engine):
    """Core ML, on a Mac; written from its documentation, and never run, as there was no Mac."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        super().__init__(path, artifact, threads, device)
        if platform.system() != "Darwin":
            raise MobileViTError(f"{path}: Core ML runs on macOS and iOS only; copy the package to a Mac")
        coremltools = import_runtime("coremltools", "coreml")
        units = "CPU_ONLY" if device == "cpu" else "ALL"
        self._model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit[units])
        self._input = self._model.get_spec().description.input[0].name

    def _streams(self, _count: int) -> list[Run]:
        return [self._run_part]

    def _run_part(self, part: Array) -> list[Array]:
        from PIL import Image

        # A package that normalizes its input takes an image.
        found = self._model.predict({self._input: Image.fromarray(part[0]) if self._artifact.baked else part})
        return [np.asarray(found[name]) for name in self._artifact.outputs]
