"""Engines: the programs that run exported files, one module each, from a batch of input to arrays of output.

On a CPU, several images are computed side by side, a thread each: the output of a layer is then still in the cache for
the next layer, which is faster than one large batch with all threads (benchmarks/engines.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from mobilevit.errors import MissingPackageError, MobileViTError, one_line
from mobilevit.machine import available_cores
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact, Format


class Engine(Protocol):
    """An artifact, loaded into its engine."""

    def run(self, images: Array) -> list[Array]:
        """Compute a batch, a multiple of the artifact's own batch size; the outputs are in the artifact's order."""
        ...


_ENGINES: dict[Format, str] = {
    "onnx": "onnx_engine.OnnxEngine",
    "openvino": "openvino_engine.OpenvinoEngine",
    "executorch": "executorch_engine.ExecutorchEngine",
    "litert": "litert_engine.LitertEngine",
    "coreml": "coreml_engine.CoremlEngine",
    "pt2": "pt2_engine.Pt2Engine",
}


def open_engine(path: Path, artifact: Artifact, *, threads: int | None, device: str, trust_pt2: bool = False) -> Engine:
    """Load an artifact into its engine.

    Raises:
        MobileViTError: the engine is not installed, cannot read the file, or does not run on this system; or the file
            is a `torch.export` program, and nobody says that it can be trusted.
    """
    if artifact.format == "pt2" and not trust_pt2:
        raise MobileViTError(
            f"{path}: refused, as loading a .pt2 file can run code that came with it; if you made it yourself or trust "
            "who did, set `trust_pt2`"
        )
    if threads is not None and threads < 1:
        raise MobileViTError(f"`threads` is {threads}; give 1 or more")
    module, _, name = _ENGINES[artifact.format].partition(".")
    make = getattr(importlib.import_module(f"mobilevit.runtime.{module}"), name)
    try:
        engine: Engine = make(path, artifact, threads or available_cores(), device)
    except (MobileViTError, KeyboardInterrupt):
        raise
    except Exception as error:  # every engine has its own exceptions
        raise MobileViTError(
            f"{path}: {artifact.format} cannot load it ({one_line(error)}); export it again"
        ) from error
    return engine


def import_runtime(module: str, extra: str) -> ModuleType:
    """Import a package that not every installation has.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingPackageError(f"{module} is not installed; pip install 'mobilevit[{extra}]'") from None


def chunks(images: Array, size: int) -> list[Array]:
    """Split a batch into parts of `size` images."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def join(parts: Iterable[Sequence[Array]]) -> list[Array]:
    """Concatenate the outputs of several runs."""
    outputs = list(zip(*parts, strict=True))
    return [np.concatenate(list(part)) if len(part) > 1 else part[0] for part in outputs]
