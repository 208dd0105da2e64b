"""The engine of `torch.export` files, PyTorch."""

from __future__ import annotations

from pathlib import Path

from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run


class Pt2Engine(Engine):
    """`torch.export`, run by PyTorch. Loading a file can run code that it brings, so `open_engine` asks first."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        import torch

        from mobilevit.devices import pick_device

        super().__init__(path, artifact, threads, device)
        self._part_size = artifact.batch_size
        self._on = pick_device("cpu" if device == "auto" else device)
        torch.set_num_threads(threads)
        program = torch.export.load(path)
        if self._on.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._on)
        self._module = program.module()

    def _streams(self, _count: int) -> list[Run]:
        return [self._run_part]

    def _run_part(self, part: Array) -> list[Array]:
        import torch

        with torch.inference_mode():
            return [output.numpy(force=True) for output in self._module(torch.from_numpy(part).to(self._on))]
