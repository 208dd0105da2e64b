"""The engine of OpenVINO."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import chunks, import_runtime, join

if TYPE_CHECKING:
    import openvino

log = logging.getLogger("mobilevit")


class OpenvinoEngine:
    """OpenVINO on any of its devices."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        runtime = import_runtime("openvino", "openvino")
        self._artifact, self._threads = artifact, threads
        self._core: openvino.Core = runtime.Core()
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

    def run(self, images: Array) -> list[Array]:
        parts = chunks(images, self._artifact.batch_size or 1)
        streams = min(self._threads, len(parts))
        compiled = self._compile(streams)
        if len(parts) == 1:
            found = compiled(parts[0])
            return [np.array(found[port]) for port in compiled.outputs]
        # Not with AsyncInferQueue: its threads take the GIL at their end, and a program that deletes the model right
        # after that hangs.
        free = [compiled.create_infer_request() for _ in range(streams)]
        computing: deque[openvino.InferRequest] = deque()
        results: list[list[Array]] = []

        def finish() -> openvino.InferRequest:
            request = computing.popleft()
            request.wait()
            results.append([np.array(tensor.data) for tensor in request.output_tensors])
            return request

        for chunk in parts:
            request = free.pop() if free else finish()
            request.start_async({0: chunk})
            computing.append(request)
        while computing:
            finish()
        return join(results)
