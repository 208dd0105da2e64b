"""The engine of OpenVINO."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run, import_runtime

if TYPE_CHECKING:
    import openvino

log = logging.getLogger("mobilevit")


class OpenvinoEngine(Engine):
    """OpenVINO on any of its devices."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        super().__init__(path, artifact, threads, device)
        self._core: openvino.Core = import_runtime("openvino", "openvino").Core()
        self._device = "CPU" if device in ("auto", "cpu") else device.upper()
        if self._device not in self._core.available_devices:
            raise MobileViTError(
                f"`device` is {device!r}, but OpenVINO sees {', '.join(self._core.available_devices).lower()} here"
            )
        self._model = self._core.read_model(path)
        self._compiled: dict[int, openvino.CompiledModel] = {}
        self._compile(1)

    def _compile(self, streams: int) -> openvino.CompiledModel:
        if streams not in self._compiled:
            settings = dict(self._artifact.settings)
            if settings.get("INFERENCE_PRECISION_HINT") == "bf16" and not self._has_bfloat16():
                if self._artifact.precision == "bf16":  # in int8, only a few layers use it
                    log.warning("this processor has no bfloat16; OpenVINO computes in float32 instead")
                settings["INFERENCE_PRECISION_HINT"] = "f32"
            if self._device == "CPU":
                settings |= {"INFERENCE_NUM_THREADS": str(self._threads), "NUM_STREAMS": str(streams)}
            self._compiled[streams] = self._core.compile_model(self._model, self._device, settings)
        return self._compiled[streams]

    def _has_bfloat16(self) -> bool:
        return "BF16" in self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")

    def _streams(self, count: int) -> list[Run]:
        compiled = self._compile(count)
        return [partial(_run, compiled.create_infer_request()) for _ in range(count)]


def _run(request: openvino.InferRequest, part: Array) -> list[Array]:
    return list(request.infer({0: part}, share_inputs=True).values())
