"""Models in PyTorch as sessions: the one door from the device floor to the training floor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit import factory
from mobilevit.card import ModelCard, card_of
from mobilevit.devices import gpu_memory_errors, normalize, pick_device
from mobilevit.explaining.explain import Explanation, explain
from mobilevit.imaging.decode import Source
from mobilevit.models.fuse import fuse
from mobilevit.runtime.session import EngineChoice
from mobilevit.weights.reading import read_file


class TorchSession:
    """A fused copy of a model in PyTorch.

    It computes as the weights are, or under autocast to `amp_dtype`. Where `torch.compile` is used, the first call with
    each input shape takes a minute.
    """

    engine = "torch"

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self.card = card
        self._original, self._device, self._amp_dtype, self._compiled = model, device, amp_dtype, compiled
        fused = fuse(model).to(device)
        self._model: nn.Module = torch.compile(fused) if compiled else fused  # type: ignore[assignment]

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Compute the outputs for resized images, in float32. See `Session`."""
        autocast = torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)
        with gpu_memory_errors(), autocast:
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device, non_blocking=True)
            output = self._model(normalize(images, self.card.preprocessing))
        named: dict[str, Tensor] = {"logits": output} if isinstance(output, Tensor) else output.named()
        return {name: tensor.float().numpy(force=True) for name, tensor in named.items()}

    @contextmanager
    def side_by_side(self) -> Iterator[bool]:
        """Let each thread compute with one core, unless the model is compiled or on a GPU."""
        if self._compiled or self._device.type != "cpu":
            yield False
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield True
        finally:
            torch.set_num_threads(before)

    def explain(self, source: Source, pixel: tuple[int, int] | None) -> Explanation:
        """Explain the prediction for an image. See `mobilevit.explain`."""
        return explain(self._original, source, pixel=pixel)

    @classmethod
    def open(cls, model: Path | nn.Module, *, device: str, threads: int | None, engine: EngineChoice) -> TorchSession:
        """Open a checkpoint or a model; see `Predictor` for arguments and errors."""
        loaded = factory.load(model) if isinstance(model, Path) else model
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(loaded, card_of(loaded), device=pick_device(device), compiled=engine == "compile")

    @staticmethod
    def read_card(path: Path) -> ModelCard:
        """Read the card of a checkpoint, without building its model."""
        return read_file(path).card
