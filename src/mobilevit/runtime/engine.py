"""Engines: the programs that run exported files, one module each, from a batch of input to arrays of output.

On a CPU, several images are computed side by side, a thread each: the output of a layer is then still in the cache for
the next layer, which is faster than one large batch with all threads (benchmarks/engines.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType

import numpy as np

from mobilevit.errors import MissingPackageError, MobileViTError, one_line
from mobilevit.machine import available_cores
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact

Run = Callable[[Array], Sequence[Array]]
"""Computes a part of a batch; the outputs are in the artifact's order."""


class Engine(ABC):
    """An artifact, loaded into its engine, which knows the devices "auto" and "cpu", and perhaps others."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        self._path, self._artifact, self._threads, self._device = path, artifact, threads, device
        self._part_size: int | None = artifact.batch_size or 1
        """Images that are computed at once; None: a whole batch."""

    @abstractmethod
    def _streams(self, count: int) -> Sequence[Run]:
        """Return what computes parts side by side, a thread each: `count` functions, or fewer."""

    def run(self, images: Array) -> list[Array]:
        """Compute a batch, a multiple of the artifact's own batch size; the outputs are in the artifact's order."""
        size = self._part_size or len(images)
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        runs = self._streams(min(self._threads, len(parts)))
        found = [runs[0](part) for part in parts] if len(runs) == 1 else _side_by_side(runs, parts)
        outputs = [list(output) for output in zip(*found, strict=True)]
        if "selected" in self._artifact.outputs:  # its image numbers start from zero in each part
            place = self._artifact.outputs.index("selected")
            outputs[place] = [rows + np.array([number * size, 0, 0]) for number, rows in enumerate(outputs[place])]
        return [np.concatenate(output) if len(output) > 1 else output[0] for output in outputs]


def _side_by_side(runs: Sequence[Run], parts: Sequence[Array]) -> list[Sequence[Array]]:
    free: SimpleQueue[Run] = SimpleQueue()
    for run in runs:
        free.put(run)

    def compute(part: Array) -> Sequence[Array]:
        run = free.get()
        try:
            return run(part)
        finally:
            free.put(run)

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(compute, parts))


def open_engine(path: Path, artifact: Artifact, *, threads: int | None, device: str, trust_pt2: bool = False) -> Engine:
    """Load an artifact into its engine.

    Raises:
        MobileViTError: the engine is not installed, cannot read the file, or does not run on this system; or the file
            is a `torch.export` program, and `trust_pt2` is not set.
    """
    name = artifact.format
    if name == "pt2" and not trust_pt2:
        raise MobileViTError(
            f"{path}: refused, as loading a .pt2 file can run code that came with it; if you made it yourself or trust "
            "who did, set `trust_pt2`"
        )
    kind: type[Engine] = getattr(import_module(f"mobilevit.runtime.{name}_engine"), f"{name.capitalize()}Engine")
    try:
        return kind(path, artifact, threads or available_cores(), device)
    except MobileViTError:
        raise
    except Exception as error:  # every engine has its own exceptions
        raise MobileViTError(f"{path}: {name} cannot load it ({one_line(error)}); export it again") from error


def import_runtime(module: str, extra: str) -> ModuleType:
    """Import a package that not every installation has.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingPackageError(f"{package} is not installed; pip install 'mobilevit[{extra}]'") from None
