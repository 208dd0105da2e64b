"""Sessions: a model in any engine, as one function from pixels to named arrays."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevit.card import ModelCard
from mobilevit.errors import MissingPackageError, MobileViTError
from mobilevit.imaging.decode import Source
from mobilevit.results.base import Array
from mobilevit.runtime import artifact as artifacts
from mobilevit.runtime.engine import open_engine
from mobilevit.runtime.tuned import find_tuned

if TYPE_CHECKING:
    from torch import nn

    from mobilevit.explaining.explain import Explanation
    from mobilevit.torch_session import TorchSession

log = logging.getLogger("mobilevit")

EngineChoice = Literal["torch", "compile", "auto"]
"""Engine of a checkpoint: PyTorch, compiled PyTorch, or the fastest that `mobilevit tune` found on this machine."""


class Session(Protocol):
    """The interface that `Predictor` and evaluation need, for any engine."""

    card: ModelCard
    """Task, classes and preprocessing of the model."""
    engine: str
    """The engine: "torch", or format and precision of an exported file, such as "onnx fp32"."""

    def run(self, pixels: NDArray[np.uint8]) -> dict[str, Array]:
        """Compute the outputs for resized images.

        Shape: (B, H, W, 3) -> "logits" (B, K) or (B, K, H, W); "boxes_xyxy" (B, A, 4) and "scores" (B, A, K), perhaps
        with "selected" (M, 3); or "label_map" (B, H, W).
        """

    def side_by_side(self) -> AbstractContextManager[bool]:
        """Prepare for threads that each compute a batch; False: batches have to take turns."""

    def explain(self, source: Source, pixel: tuple[int, int] | None, /) -> Explanation:
        """Explain the prediction for an image; see `mobilevit.explain`."""


class ArtifactSession:
    """An exported file in its own engine; see `Predictor` for arguments and errors."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = "auto",
        trust_pt2: bool = False,
    ) -> None:
        path = Path(path)
        self.artifact = artifacts.read_sidecar(path)
        self.card, self.engine = self.artifact.card, f"{self.artifact.format} {self.artifact.precision}"
        self._engine = open_engine(path, self.artifact, threads=threads, device=device, trust_pt2=trust_pt2)

    def run(self, pixels: NDArray[np.uint8]) -> dict[str, Array]:
        """Compute the outputs, named as in `artifact.outputs`; see `Session`."""
        size, wanted = pixels.shape[1:3], self.artifact.image_size
        if wanted is not None and size != wanted:
            raise MobileViTError(
                f"images of {size[0]} x {size[1]} for a model exported at {wanted[0]} x {wanted[1]} only; export "
                "with `dynamic` size for any size"
            )
        images: Array = pixels if self.artifact.baked else self.card.preprocessing.normalize(pixels)
        missing = -len(images) % (self.artifact.batch_size or 1)
        if missing:
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        found = self._engine.run(np.ascontiguousarray(images))
        outputs = dict(zip(self.artifact.outputs, found, strict=True))
        selected = outputs.pop("selected", None)
        outputs = {name: output[: len(pixels)] for name, output in outputs.items()}
        return outputs if selected is None else outputs | {"selected": selected[selected[:, 0] < len(pixels)]}

    def side_by_side(self) -> AbstractContextManager[bool]:
        """Yield False: engines divide a batch between cores themselves."""
        return nullcontext(False)

    def explain(self, _source: Source, _pixel: tuple[int, int] | None, /) -> Explanation:
        """Raise an error: an exported file gives no access to its layers."""
        raise MobileViTError("an exported file cannot be explained; use the checkpoint it was exported from")


def open_session(
    model: str | os.PathLike[str] | nn.Module,
    *,
    device: str = "auto",
    threads: int | None = None,
    engine: EngineChoice = "torch",
    trust_pt2: bool = False,
) -> Session:
    """Open a checkpoint, an artifact or a model; see `Predictor` for arguments and errors."""
    if threads is not None and threads < 1:
        raise MobileViTError(f"`threads` is {threads}; give 1 or more")
    if not isinstance(model, str | os.PathLike):
        return _torch_session("a model").open(model, device=device, threads=threads, engine=engine)
    path = Path(model)
    if artifacts.is_artifact(path):
        if engine != "torch":
            raise MobileViTError(f"{path}: an exported file runs in its own engine; leave `engine` out")
        return ArtifactSession(path, threads=threads, device=device, trust_pt2=trust_pt2)
    tuned = find_tuned(path) if engine == "auto" and device in ("auto", "cpu") else None
    if tuned is not None:
        artifact, its_threads = tuned
        if trust_pt2 or artifact.suffix != ".pt2":
            return ArtifactSession(artifact, threads=threads or its_threads, trust_pt2=trust_pt2)
        log.warning("%s: not used, as loading a .pt2 file can run code that came with it; see trust_pt2", artifact)
    return _torch_session(str(path)).open(path, device=device, threads=threads, engine=engine)


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """Read the card of a checkpoint or an exported file.

    Raises:
        MobileViTError: the file cannot be read, or is a checkpoint and torch is not installed.
    """
    path = Path(path)
    if artifacts.is_artifact(path):
        return artifacts.read_sidecar(path).card
    return _torch_session(str(path)).read_card(path)


def _torch_session(what: str) -> type[TorchSession]:
    """Import the only class above that this floor opens."""
    try:
        found: type[TorchSession] = import_module("mobilevit.torch_session").TorchSession
        return found
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mobilevit"):
            raise
        raise MissingPackageError(
            f"{what} runs in PyTorch, which is not installed ({error.name} is missing); pip install "
            "'mobilevit[train]', or export it where PyTorch is, and use the exported file here"
        ) from None
