"""The engine of LiteRT (TensorFlow Lite), on the CPU through XNNPACK."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobilevit.errors import MissingPackageError, MobileViTError, one_line
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import chunks, join

# The runtime alone, its name until 2024, and the package that contains both.
_RUNTIMES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite")

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter


class LitertSession:
    """A .tflite file, ready to run; threads cannot share it.

    Args:
        path: the file.
        threads: threads of a run; None: LiteRT chooses.

    Raises:
        MobileViTError: no runtime is installed, or it cannot read the file.
    """

    def __init__(self, path: Path, *, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise MobileViTError(f"`threads` is {threads}; give 1 or more")
        make = _interpreter()
        try:
            self._interpreter = make(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
            self._input = self._interpreter.get_input_details()[0]
            outputs = self._interpreter.get_signature_runner().get_output_details()
        except (ValueError, RuntimeError) as error:
            raise MobileViTError(f"{path}: LiteRT cannot load it ({one_line(error)}); export it again") from error
        # The converter numbers the outputs in the order of the graph; their order in the file may differ.
        names = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
        self._outputs = [outputs[name]["index"] for name in names]

    def run(self, x: Array) -> list[Array]:
        """Run with exactly the batch and size of the export; the outputs are in the order of the graph.

        Raises:
            MobileViTError: the input has another shape or type.
        """
        shape, dtype = tuple(int(side) for side in self._input["shape"]), np.dtype(self._input["dtype"])
        if x.shape != shape or x.dtype != dtype:
            raise MobileViTError(f"input is {x.dtype} {x.shape}; this file takes {dtype} {shape}")
        self._interpreter.set_tensor(self._input["index"], x)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def _interpreter() -> type[Interpreter]:
    for name in _RUNTIMES:
        try:
            kind: type[Interpreter] = importlib.import_module(name).Interpreter
            return kind
        except ImportError:
            continue
    raise MissingPackageError("ai_edge_litert is not installed; pip install 'mobilevit[litert]'")


class LitertEngine:
    """LiteRT on the CPU."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        if device not in ("auto", "cpu"):
            raise MobileViTError(f"`device` is {device!r}, but LiteRT runs on the cpu here")
        self._path, self._artifact, self._threads = path, artifact, threads
        self._whole = LitertSession(path, threads=threads)
        self._streams: list[LitertSession] = []
        """Sessions with one thread each."""

    def run(self, images: Array) -> list[Array]:
        parts = chunks(images, self._artifact.batch_size or 1)
        if len(parts) == 1 or self._threads == 1:
            return join(self._whole.run(chunk) for chunk in parts)
        while len(self._streams) < min(self._threads, len(parts)):
            self._streams.append(LitertSession(self._path, threads=1))
        count = len(self._streams)
        results: list[list[Array]] = [[] for _ in parts]

        def work(stream: int) -> None:
            for place in range(stream, len(parts), count):
                results[place] = self._streams[stream].run(parts[place])

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
        return join(results)
