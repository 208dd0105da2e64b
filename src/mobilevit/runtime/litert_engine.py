"""The engine of LiteRT (TensorFlow Lite), on the CPU through XNNPACK."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run, import_runtime

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter


class LitertEngine(Engine):
    """LiteRT on the CPU: an interpreter that uses all threads, and for several parts one with one thread for each."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        super().__init__(path, artifact, threads, device)
        if device not in ("auto", "cpu"):
            raise MobileViTError(f"`device` is {device!r}, but LiteRT runs on the cpu here")
        self._runtime = import_runtime("ai_edge_litert.interpreter", "litert")
        self._whole = self._open(threads)
        self._singles: list[Run] = []

    def _streams(self, count: int) -> list[Run]:
        if count == 1:
            return [self._whole]
        while len(self._singles) < count:
            self._singles.append(self._open(1))
        return self._singles[:count]

    def _open(self, threads: int) -> Run:
        interpreter = self._runtime.Interpreter(model_path=str(self._path), num_threads=threads)
        interpreter.allocate_tensors()
        outputs = interpreter.get_signature_runner().get_output_details()
        # The converter numbers the outputs in the order of the graph; their order in the file may differ.
        names = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
        return partial(_run, interpreter, [outputs[name]["index"] for name in names])


def _run(interpreter: Interpreter, outputs: list[int], part: Array) -> list[Array]:
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], part)
    interpreter.invoke()
    return [interpreter.get_tensor(index) for index in outputs]
