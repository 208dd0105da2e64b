"""The engine of Core ML."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import chunks, import_runtime, join


class CoremlEngine:
    """Core ML, on a Mac; written from its documentation, and never run, as there was no Mac."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        if platform.system() != "Darwin":
            raise MobileViTError(f"{path}: Core ML runs on macOS and iOS only; copy the package to a Mac")
        coremltools = import_runtime("coremltools", "coreml")
        del threads  # Core ML decides
        units = "CPU_ONLY" if device == "cpu" else "ALL"
        self._model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit[units])
        self._artifact = artifact
        self._input = self._model.get_spec().description.input[0].name

    def run(self, images: Array) -> list[Array]:
        return join(self._one(chunk) for chunk in chunks(images, self._artifact.batch_size or 1))

    def _one(self, chunk: Array) -> list[Array]:
        from PIL import Image

        # A package that normalizes its input takes an image.
        found = self._model.predict({self._input: Image.fromarray(chunk[0]) if self._artifact.baked else chunk})
        return [np.asarray(found[name]) for name in self._artifact.outputs]
