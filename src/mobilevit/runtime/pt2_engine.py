"""The engine of `torch.export` files, PyTorch."""

from __future__ import annotations

from pathlib import Path

from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import chunks, join


class Pt2Engine:
    """`torch.export`, run by PyTorch. Loading a file can run code that it brings, so `open_engine` asks first."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        import torch

        from mobilevit.devices import pick_device

        self._torch, self._artifact = torch, artifact
        self._device = pick_device("cpu" if device == "auto" else device)
        torch.set_num_threads(threads)
        program = torch.export.load(path)
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._module = program.module()

    def run(self, images: Array) -> list[Array]:
        torch, size = self._torch, self._artifact.batch_size or len(images)
        with torch.inference_mode():
            outputs = [self._module(torch.from_numpy(chunk).to(self._device)) for chunk in chunks(images, size)]
        return join([part.numpy(force=True) for part in parts] for parts in outputs)
