"""The runtimes that artefacts run in: one class each, from a batch of input to arrays of output.

Several pictures are computed side by side, one thread each, a few pictures at a time: what one layer leaves in the
cache is then still there for the next, which is faster than one large batch through all threads
(benchmarks/engines.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevit.inference.artefact import Artefact, Format

Array = NDArray[Any]


class Backend(Protocol):
    """A loaded artefact."""

    def run(self, images: Array) -> list[Array]:
        """From a batch, of which the artefact's own batch size is a divisor, to its outputs in their order."""
        ...


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxBackend:
    """ONNX Runtime."""

    def __init__(self, path: Path, artefact: Artefact, threads: int, device: str) -> None:
        self._runtime = _import("onnxruntime", "onnx")
        self._path, self._artefact, self._threads = path, artefact, threads
        providers = self._runtime.get_available_providers()
        self._providers = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in providers:
                raise ValueError(f"--device {device}: this ONNX Runtime has no CUDA; pip install onnxruntime-gpu")
            self._providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        elif device not in ("auto", "cpu"):
            raise ValueError(f"--device {device}: ONNX Runtime is used on cpu or cuda")
        self._sessions: dict[int, Any] = {}
        self._session(threads)

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            self._sessions[threads] = self._runtime.InferenceSession(self._path, options, providers=self._providers)
        return self._sessions[threads]

    def run(self, images: Array) -> list[Array]:
        chunks = _chunks(images, self._artefact.batch_size or 1)
        streams = min(self._threads, len(chunks)) if self._providers == ["CPUExecutionProvider"] else 1
        session = self._session(self._threads // streams)
        name = session.get_inputs()[0].name
        with ThreadPoolExecutor(streams) as pool:
            return _join(pool.map(lambda chunk: session.run(None, {name: chunk}), chunks))


class OpenvinoBackend:
    """OpenVINO."""

    def __init__(self, path: Path, artefact: Artefact, threads: int, device: str) -> None:
        openvino = _import("openvino", "openvino")
        self._artefact, self._threads = artefact, threads
        self._core = openvino.Core()
        self._device = "CPU" if device in ("auto", "cpu") else device.upper()
        if self._device not in self._core.available_devices:
            raise ValueError(f"--device {device}: OpenVINO sees {', '.join(self._core.available_devices).lower()} here")
        self._openvino = openvino
        self._model = self._core.read_model(path)
        self._compiled: dict[int, Any] = {}
        self._compile(1)

    def _compile(self, streams: int) -> Any:
        if streams not in self._compiled:
            settings = dict(self._artefact.settings)
            if self._device == "CPU":
                settings |= {"INFERENCE_NUM_THREADS": str(self._threads), "NUM_STREAMS": str(streams)}
            self._compiled[streams] = self._core.compile_model(self._model, self._device, settings)
        return self._compiled[streams]

    def run(self, images: Array) -> list[Array]:
        chunks = _chunks(images, self._artefact.batch_size or 1)
        streams = min(self._threads, len(chunks))
        compiled = self._compile(streams)
        if len(chunks) == 1:
            found = compiled(chunks[0])
            return [np.array(found[port]) for port in compiled.outputs]
        results: list[list[Array]] = [[] for _ in chunks]

        def keep(request: Any, place: int) -> None:
            results[place] = [np.array(tensor.data) for tensor in request.output_tensors]

        queue = self._openvino.AsyncInferQueue(compiled, streams)
        queue.set_callback(keep)
        for place, chunk in enumerate(chunks):
            queue.start_async({0: chunk}, place)
        queue.wait_all()
        return _join(results)


class Pt2Backend:
    """`torch.export`, run by PyTorch."""

    def __init__(self, path: Path, artefact: Artefact, threads: int, device: str) -> None:
        import torch

        from mobilevit.devices import pick_device

        self._torch, self._artefact = torch, artefact
        self._device = pick_device("cpu" if device == "auto" else device)
        torch.set_num_threads(threads)
        program = torch.export.load(path)
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._module = program.module()

    def run(self, images: Array) -> list[Array]:
        torch, size = self._torch, self._artefact.batch_size or len(images)
        with torch.inference_mode():
            outputs = [self._module(torch.from_numpy(chunk).to(self._device)) for chunk in _chunks(images, size)]
        return _join([part.numpy(force=True) for part in parts] for parts in outputs)


_BACKENDS: dict[Format, Callable[[Path, Artefact, int, str], Backend]] = {
    "onnx": OnnxBackend,
    "openvino": OpenvinoBackend,
    "pt2": Pt2Backend,
}


def open_backend(path: Path, artefact: Artefact, *, threads: int | None, device: str) -> Backend:
    """Load an artefact into its runtime.

    Raises:
        ValueError: the runtime is not installed, cannot read the file, or does not run on this system.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")
    if artefact.format not in _BACKENDS:
        raise ValueError(f"{path}: Core ML runs on macOS and iOS only; copy the package to a Mac")
    try:
        return _BACKENDS[artefact.format](path, artefact, threads or available_cores(), device)
    except (ValueError, KeyboardInterrupt):
        raise
    except Exception as error:  # every runtime has its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: {artefact.format} cannot load it ({reason}); export it again") from error


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{module} is not installed; pip install 'mobilevit[{extra}]'") from None


def _chunks(images: Array, size: int) -> list[Array]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _join(parts: Iterable[Sequence[Array]]) -> list[Array]:
    outputs = list(zip(*parts, strict=True))
    return [np.concatenate(list(part)) if len(part) > 1 else part[0] for part in outputs]
