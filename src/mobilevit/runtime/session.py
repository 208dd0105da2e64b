"""A model in some runtime, as one function: from pixels to what the model's task puts out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit import factory
from mobilevit.card import ModelCard, Task, card_of
from mobilevit.devices import pick_device
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import SegmentationOutput
from mobilevit.models.fuse import fuse
from mobilevit.runtime import artifact as artifacts
from mobilevit.runtime.backends import open_backend
from mobilevit.runtime.tuned import find_tuned
from mobilevit.tasks.detection import MAX_DETECTIONS, DecodedOutput, Detections


class Session(Protocol):
    """What `Predictor` and evaluation ask of a model, wherever it runs."""

    def __call__(self, pixels: Tensor) -> Any:
        """From resized images to the output of the model's task.

        Shape: uint8 (B, 3, H, W) -> logits (B, K); for detection what `postprocess` takes; or `SegmentationOutput`.
        """
        ...


class TorchSession:
    """A model in PyTorch, fused.

    Args:
        model: of any task; it stays as it is.
        preprocessing: how its pixels are scaled.
        device: to compute on.
        amp_dtype: compute in this type where that loses little, by autocast; None: as the weights are.
        compiled: through `torch.compile`; the first call of every input shape then takes a minute.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self._preprocessing, self._device, self._amp_dtype = preprocessing, device, amp_dtype
        self._model: Any = fuse(model).to(device)
        if compiled:
            self._model = torch.compile(self._model)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Any:
        images = self._preprocessing.normalize(pixels.to(self._device, non_blocking=True))
        with torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None):
            return self._model(images)


class ArtifactSession:
    """An exported file in its own runtime.

    Args:
        path: of the artifact; its sidecar lies beside it.
        threads: to compute with; None: as many as there are cores.
        device: "auto" or "cpu", and what else the runtime knows, such as "cuda".

    Raises:
        ValueError: file or sidecar missing, edited, or newer than this package; the runtime is not installed or has no
            such device.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto") -> None:
        path = Path(path)
        self.artifact = artifacts.read_sidecar(path)
        self._backend = open_backend(path, self.artifact, threads=threads, device=device)

    @property
    def card(self) -> ModelCard:
        """What the model says of itself."""
        return self.artifact.card

    def __call__(self, pixels: Tensor) -> Any:
        return self.output(self.raw(pixels))

    def raw(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The artifact's own outputs, as `artifact.outputs` names them. Shape: uint8 (B, 3, H, W) -> (B, ...) each."""
        self._check(pixels)
        if self.artifact.baked:
            images = pixels.permute(0, 2, 3, 1).numpy(force=True)
        else:
            images = self.card.preprocessing.normalize(pixels.cpu()).numpy()
        images = np.ascontiguousarray(images)
        count, at_once = len(images), self.artifact.batch_size
        if at_once is not None:
            missing = -count % at_once
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        if "selected" in self.artifact.outputs:
            parts = self._run_selecting(images, count)
        else:
            parts = [part[:count] for part in self._backend.run(images)]
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)

    def _run_selecting(self, images: NDArray[Any], count: int) -> list[NDArray[Any]]:
        """Run after run, as each counts its images from zero."""
        size = self.artifact.batch_size or len(images)
        found = []
        for start in range(0, len(images), size):
            boxes, scores, selected = self._backend.run(images[start : start + size])
            found.append((boxes, scores, selected + np.array([start, 0, 0])))
        boxes, scores, selected = (np.concatenate(part) for part in zip(*found, strict=True))
        return [boxes[:count], scores[:count], selected[selected[:, 0] < count]]

    def output(self, raw: tuple[Tensor, ...]) -> Any:
        """The artifact's outputs as the task's type."""
        return _OUTPUT[self.card.task](*raw)

    def _check(self, pixels: Tensor) -> None:
        size, wanted = (pixels.shape[2], pixels.shape[3]), self.artifact.image_size
        if wanted is not None and size != wanted:
            raise MobileViTError(
                f"images of {size[0]} x {size[1]} for a model exported at {wanted[0]} x {wanted[1]} only; export "
                "with --dynamic size for any size"
            )


Engine = Literal["torch", "compile", "auto"]
"""What runs a checkpoint: PyTorch, PyTorch compiled, or what `mobilevit tune` found to be fastest on this machine."""


def open_session(
    model: str | os.PathLike[str] | nn.Module, *, device: str, threads: int | None = None, engine: Engine = "torch"
) -> tuple[ModelCard, Session]:
    """A checkpoint, an artifact or a model, ready to run; and its card. See `Predictor` for arguments and errors."""
    if not isinstance(model, nn.Module):
        path = Path(model)
        if artifacts.is_artifact(path):
            if engine != "torch":
                raise MobileViTError(f"{path}: an exported file runs in its own runtime; leave --engine out")
            session = ArtifactSession(path, threads=threads, device=device)
            return session.card, session
        tuned = find_tuned(path) if engine == "auto" and device in ("auto", "cpu") else None
        if tuned is not None:
            artifact, its_threads = tuned
            session = ArtifactSession(artifact, threads=threads or its_threads)
            return session.card, session
        model = factory.load(path)
    if threads is not None:
        if threads < 1:
            raise MobileViTError(f"threads is {threads}; give 1 or more")
        torch.set_num_threads(threads)
    card = card_of(model)
    compiled = engine == "compile"
    return card, TorchSession(model, card.preprocessing, device=pick_device(device), compiled=compiled)


def _logits(logits: Tensor) -> Tensor:
    return logits.float()


def _boxes(boxes_xyxy: Tensor, scores: Tensor, selected: Tensor | None = None) -> DecodedOutput | list[Detections]:
    """`selected` (M, 3) are image, class and anchor of the boxes that the artifact itself has kept."""
    if selected is None:
        return DecodedOutput(boxes_xyxy.float(), scores.float())
    found = []
    for number in range(len(boxes_xyxy)):
        _, classes, anchors = selected[selected[:, 0] == number].T
        order = scores[number, anchors, classes].argsort(descending=True)[:MAX_DETECTIONS]
        anchors, classes = anchors[order], classes[order]
        found.append(Detections(boxes_xyxy[number, anchors], scores[number, anchors, classes], classes))
    return found


def _masks(answer: Tensor) -> SegmentationOutput:
    return SegmentationOutput(answer, None)


_OUTPUT: dict[Task, Any] = {"classification": _logits, "detection": _boxes, "segmentation": _masks}
